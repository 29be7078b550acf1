"""Work that may kill its process, done in a child process that one speaks with.

`careful` has pictures answered so; here files are read so whose reader may abort. The child gets
neither the store nor this process's environment: it asks its parent for each part of the file, and
what it says is taken for bytes or JSON, never for Python objects. It is used again and again, and
ends with its parent, of whom it then hears no more.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn, cast

from pipeline.errors import MaskfleetError, RunUnfinished
from pipeline.heap import out_of_memory
from pipeline.ranged import Ranged

READY_S = 120.0  # a child loads Python and this file: a moment, more on a crowded machine
PATIENCE_S = 60  # without a word from a child; a part of a table is decoded in a second or two
MEMORY_MB = 8192  # a child's own, at most; what a picture may have alone
ENDS_S = 10  # a process that has closed its channel is gone at once
IDLE = 4  # children that are kept for the next file
WANTS_MEMORY = 71  # exit code of a child that would need more
KNOWN = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "TMPDIR")
"""What a child learns of our environment: nothing that opens a store."""


class ProcessDied(Exception):
    """A child did not survive a file; says how it ended."""

    def __init__(self, exit_code: int) -> None:
        self.late = exit_code == -signal.SIGALRM
        if self.late:
            why = f"its reader was still busy after {PATIENCE_S} s"
        elif exit_code == WANTS_MEMORY:
            why = f"its reader wants more than {MEMORY_MB} MB"
        else:
            why = f"it ended its reader's process (exit {exit_code})"
        super().__init__(why)


Work = Callable[..., Iterator[Any]]
"""What is done with a file: a function of a module, called with the file (seekable, readable) and
with what JSON can say; it yields bytes, or what JSON can say."""


def answers(file: Ranged, work: Work, *arguments: object) -> Iterator[Any]:
    """What ``work(file, *arguments)`` yields, from a child process.

    Args:
        file: read here, as the child asks for its parts.
        work: see `Work`.
        arguments: for it.

    Raises:
        ValueError: that the work raised.
        ProcessDied: the child has.
        StorageError: the file cannot be read.
        RunUnfinished: no child can start.
    """
    child, sound = _free(), False
    try:
        yield from child.answers(file, work, arguments)
        sound = True
    except ValueError:
        sound = True
        raise
    except _Silence as silence:
        raise ProcessDied(child.exit_code()) from silence
    finally:
        if sound and len(_idle[os.getpid()]) < IDLE:
            _idle[os.getpid()].append(child)
        else:
            child.end()


_idle: "defaultdict[int, list[_Child]]" = defaultdict(list)
"""Of each process: one that is forked has its parent's as well, and they are not its own."""


def _free() -> "_Child":
    with contextlib.suppress(IndexError):
        while not (child := _idle[os.getpid()].pop()).alive:  # it died of nothing it was given
            child.end()
        return child
    return _Child()


@atexit.register
def _end_all() -> None:
    for child in _idle.pop(os.getpid(), []):
        child.end()


def spoken_with(
    module: Sequence[str],
    bind: Callable[[Sequence[str]], list[str]] = list,
    known: Mapping[str, str] = os.environ,
) -> tuple["subprocess.Popen[bytes]", Connection]:
    """Start a module of ours with a channel to it, whose file descriptor is its last argument.

    Args:
        module: its name and arguments.
        bind: what else becomes of the command.
        known: its environment; Python's path is added.
    """
    ours, theirs = cast("tuple[Connection, Connection]", Pipe())
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [known.get("PYTHONPATH")])])
    # -P: the folder we are called in may be somebody's archive, and hold a file named like a module
    process = subprocess.Popen(  # noqa: S603 - our own module
        bind([sys.executable, "-P", "-m", *module, str(theirs.fileno())]),
        pass_fds=[theirs.fileno()],
        env={**known, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        process_group=0,  # a terminal's Ctrl-C is for the parent, which finishes what it began
    )
    theirs.close()
    return process, ours


def told(error: Exception) -> Exception:
    """An error of a child as its parent raises it, without what it holds, which may not travel."""
    if isinstance(error, MaskfleetError):
        return type(error)(str(error))
    if out_of_memory(error):
        return MemoryError(str(error))
    return RuntimeError(f"in a child process:\n{traceback.format_exc()}")


def limit_memory(megabytes: int) -> None:
    """Bound the heap this process may still take."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = taken + megabytes * 1024**2
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


# ----------------------------------------------------------------------------------- the channel

READY, READ, BYTES, VALUE, REFUSAL, BUG, END = b"+", b"r", b"b", b"v", b"f", b"x", b"e"
"""What a child says: the first byte of a message; then bytes, or JSON."""


class _Silence(Exception):
    """The other side is heard no more."""


def _heard(channel: Connection) -> tuple[bytes, bytes]:
    try:
        message = channel.recv_bytes()
    except (EOFError, OSError) as error:  # OSError: in the middle of a message
        raise _Silence from error
    return message[:1], message[1:]


def _said(channel: Connection, what: bytes, about: object = None) -> None:
    data = about if isinstance(about, bytes) else json.dumps(about).encode()
    try:
        channel.send_bytes(what + data)
    except OSError as error:
        raise _Silence from error


class _Child:
    """Reads one file at a time."""

    def __init__(self) -> None:
        known = {name: os.environ[name] for name in KNOWN if name in os.environ}
        try:
            self._process, self._ours = spoken_with(["pipeline.apart"], known=known)
        except OSError as error:
            raise RunUnfinished(_no_child(f"cannot start ({error})")) from error
        ready = self._ours.poll(READY_S)
        if ready:
            with contextlib.suppress(_Silence):
                _heard(self._ours)
                return
        how = f"exit {self.exit_code()}" if ready else f"not ready after {READY_S:g} s"
        self.end()
        raise RunUnfinished(_no_child(f"ended before it could begin ({how})"))

    @property
    def alive(self) -> bool:
        """Whether it can take another file."""
        return self._process.poll() is None

    def answers(self, file: Ranged, work: Work, arguments: Sequence[object]) -> Iterator[Any]:
        """See `answers`."""
        name = [work.__module__, work.__name__]
        _said(self._ours, b"", [*name, file.nbytes, PATIENCE_S, *arguments])
        while True:
            what, about = _heard(self._ours)
            if what == READ:
                start, length = json.loads(about)
                file.seek(start)
                _said(self._ours, BYTES, file.read(length))
            elif what == BYTES:
                yield about
            elif what == VALUE:
                yield json.loads(about)
            elif what == REFUSAL:
                raise ValueError(json.loads(about))
            elif what == BUG:
                raise RuntimeError(f"in a child process:\n{json.loads(about)}")
            elif what == END:
                return
            else:
                raise _Silence

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


def _no_child(why: str) -> str:
    return (
        f"the process that is to read tables {why}; run the same command again with fewer "
        "--compute.workers, or more memory"
    )


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
        module, name, nbytes, self._patience_s, *arguments = json.loads(
            b"".join(_heard(self._channel))
        )
        signal.alarm(self._patience_s)
        return getattr(import_module(module), name), nbytes, arguments

    def tell(self, what: bytes, about: object = None) -> None:
        """Say something."""
        signal.alarm(0)
        _said(self._channel, what, about)
        signal.alarm(self._patience_s)

    def read(self, path: str, start: int = 0, length: int | None = None, **_: object) -> bytes:  # noqa: ARG002
        """See `Store.read`."""
        self.tell(READ, [start, length])
        signal.alarm(0)
        data = _heard(self._channel)[1]
        signal.alarm(self._patience_s)
        return data


def _serve(parent: _Parent) -> NoReturn:
    parent.tell(READY)
    while True:
        try:
            work, nbytes, arguments = parent.order()
            for said in work(Ranged(cast("Any", parent), "", nbytes, None), *arguments):
                parent.tell(BYTES if isinstance(said, bytes) else VALUE, said)
        except ValueError as error:
            parent.tell(REFUSAL, str(error))
        except MemoryError:  # perhaps in the middle of a message: there is no way on
            os._exit(WANTS_MEMORY)
        except _Silence:
            raise
        except Exception:  # noqa: BLE001 - the parent raises it
            parent.tell(BUG, traceback.format_exc())
        else:
            parent.tell(END)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the parent, where one ends them all
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the last words of what aborts
    limit_memory(MEMORY_MB)
    with contextlib.suppress(_Silence):  # the parent is done
        _serve(_Parent(Connection(int(sys.argv[1]))))
