"""Work that may kill its process, done in a child process that one speaks with.

`careful` has pictures answered so; here files are read so whose reader may abort. Nothing but bytes
travels: the child has no store and no credentials, it asks its parent for each part of the file.
A child is used again and again; it ends with its parent, of whom it then hears no more.
"""

import atexit
import contextlib
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn, cast

from pipeline.ranged import Ranged

PATIENCE_S = 60  # without a word from a child; a part of a table is decoded in a second or two
MEMORY_MB = 8192  # a child's own, at most; what a picture may have alone
ENDS_S = 10  # a process that has closed its channel is gone at once
TRIES = 2  # children that a file may cost: the first may have been the machine's fault
IDLE = 4  # children that are kept for the next file


class ProcessDied(Exception):
    """A child did not survive a file; says how it ended."""

    def __init__(self, exit_code: int) -> None:
        self.late = exit_code == -signal.SIGALRM
        if self.late:
            why = f"its reader was still busy after {PATIENCE_S} s"
        else:
            why = f"it ended its reader's process (exit {exit_code})"
        super().__init__(f"{why}, {TRIES} times")


Work = Callable[..., Iterator[Any]]
"""What is done with a file: takes it (seekable, readable), and more; yields what can be pickled."""


def answers(file: Ranged, work: Work, *arguments: object) -> Iterator[Any]:
    """What ``work(file, *arguments)`` yields, from a child process.

    Args:
        file: read here, as the child asks for its parts.
        work: a function of a module.
        arguments: for it; they travel.

    Raises:
        ValueError: that the work raised.
        ProcessDied: the child has.
        StorageError: the file cannot be read.
    """
    child, sound = _free(), False
    try:
        yield from child.answers(file, work, arguments)
        sound = True
    except ValueError:
        sound = True
        raise
    except (EOFError, ConnectionError) as error:
        raise ProcessDied(child.exit_code()) from error
    finally:
        if sound and len(_idle[os.getpid()]) < IDLE:
            _idle[os.getpid()].append(child)
        else:
            child.end()


_idle: "defaultdict[int, list[_Child]]" = defaultdict(list)
"""Of each process: one that is forked has its parent's as well, and they are not its own."""


def _free() -> "_Child":
    with contextlib.suppress(IndexError):
        return _idle[os.getpid()].pop()
    return _Child()


@atexit.register
def _end_all() -> None:
    for child in _idle.pop(os.getpid(), []):
        child.end()


def spoken_with(
    module: Sequence[str], bind: Callable[[Sequence[str]], list[str]] = list
) -> tuple["subprocess.Popen[bytes]", Connection]:
    """Start a module of ours with a channel to it, whose file descriptor is its last argument.

    Args:
        module: its name and arguments.
        bind: what else becomes of the command.
    """
    ours, theirs = cast("tuple[Connection, Connection]", Pipe())
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(  # noqa: S603 - our own module
        bind([sys.executable, "-m", *module, str(theirs.fileno())]),
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        process_group=0,  # a terminal's Ctrl-C is for the parent, which finishes what it began
    )
    theirs.close()
    return process, ours


def limit_memory(megabytes: int) -> None:
    """Bound the heap this process may still take."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = taken + megabytes * 1024**2
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class _Child:
    """Reads one file at a time."""

    def __init__(self) -> None:
        self._process, self._ours = spoken_with(["pipeline.apart"])

    def answers(self, file: Ranged, work: Work, arguments: Sequence[object]) -> Iterator[Any]:
        """See `answers`."""
        self._ours.send((work, file.nbytes, arguments, PATIENCE_S))
        while True:
            what, said = self._ours.recv()
            if what == "read":
                file.seek(said[0])
                self._ours.send_bytes(file.read(said[1]))
            elif what == "answer":
                yield said
            elif what == "refusal":
                raise ValueError(said)
            elif what == "bug":
                raise RuntimeError(f"in a child process:\n{said}")
            else:
                return

    def end(self) -> None:
        """Stop it."""
        self._ours.close()
        self._process.kill()
        self._process.wait()

    def exit_code(self) -> int:
        """How it ended, once it is heard no more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(ENDS_S)
        self.end()
        return -signal.SIGKILL


# --------------------------------------------------------------------------------- in the child


class _Parent:
    """The parent as the store that a file is read from, and the ear that hears the answers.

    While it is waited for no clock runs; else the kernel ends this process once time is up, in the
    middle of whatever it does.
    """

    def __init__(self, channel: Connection) -> None:
        self._channel, self._patience_s = channel, 0

    def order(self) -> tuple[Work, int, Sequence[object]]:
        """The next piece of work."""
        signal.alarm(0)
        work, nbytes, arguments, self._patience_s = self._channel.recv()
        signal.alarm(self._patience_s)
        return work, nbytes, arguments

    def tell(self, what: str, said: object = None) -> None:
        """Say something."""
        signal.alarm(0)
        self._channel.send((what, said))
        signal.alarm(self._patience_s)

    def read(self, path: str, start: int = 0, length: int | None = None, **_: object) -> bytes:  # noqa: ARG002
        """See `Store.read`."""
        signal.alarm(0)
        self._channel.send(("read", (start, length)))
        data = self._channel.recv_bytes()
        signal.alarm(self._patience_s)
        return data


def _serve(parent: _Parent) -> NoReturn:
    while True:
        try:
            work, nbytes, arguments = parent.order()
            for said in work(Ranged(cast("Any", parent), "", nbytes, None), *arguments):
                parent.tell("answer", said)
        except (ValueError, MemoryError) as error:
            parent.tell("refusal", str(error) or f"its reader wants more than {MEMORY_MB} MB")
        except (EOFError, ConnectionError):
            raise
        except Exception:  # noqa: BLE001 - the parent raises it
            parent.tell("bug", traceback.format_exc())
        else:
            parent.tell("end")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the parent, where one ends them all
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the last words of what aborts
    limit_memory(MEMORY_MB)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is done
        _serve(_Parent(Connection(int(sys.argv[1]))))
