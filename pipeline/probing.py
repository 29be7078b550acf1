"""A process that is ready to probe a model when Ray has started on the same machine (cluster.py).

Ray's start waits more than it works. A first worker would import torch only after it, and begin
four seconds later (2 cores, 2026-11-30). The model comes when Ray is there: nothing disturbs what
is timed, and whether there is a GPU for us is Ray's to say.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from pipeline.apart import spoken_with, told
from pipeline.bound import bound
from pipeline.config import SegmentConfig
from pipeline.errors import RunUnfinished
from pipeline.place import Found


@contextlib.contextmanager
def probing() -> Iterator[Callable[[tuple[bytes, bytes], SegmentConfig], Found]]:
    """Begin; what it gives probes a bundle as a config wants it used.

    Raises:
        RunRefused: the bundle cannot be used; by the call, as are:
        RunUnfinished: the process ended, or was silent for longer than no_progress_s.
        MemoryError: it had too little.
    """
    try:
        process, ours = spoken_with(["pipeline.probing"], bound)
    except OSError as error:
        raise RunUnfinished(f"no process can be started to probe the model: {error}") from error
    sending: list[threading.Thread] = []

    def found(bundle: tuple[bytes, bytes], config: SegmentConfig) -> Found:
        patience_s = config.compute.no_progress_s
        # By a thread: who is not read from waits, and the wait for an answer has an end.
        asked = (bundle, config.model_dump_json())
        sending.append(threading.Thread(target=_sent, args=(ours, asked), daemon=True))
        sending[-1].start()
        try:
            if not ours.poll(patience_s):
                raise RunUnfinished(
                    f"the model was not probed after {patience_s:g} s (--compute.no-progress-s); "
                    "run the same command again"
                )
            said = ours.recv()
        except (EOFError, OSError) as error:
            raise RunUnfinished(
                f"the process that was to probe the model ended (exit {process.wait()}); did it "
                "lack memory? Run the same command again"
            ) from error
        if isinstance(said, Exception):
            raise said
        return said

    try:
        yield found
    finally:
        process.kill()
        process.wait()
        for thread in sending:  # it ends, for nobody is at the other end; a number that is closed
            thread.join()  # under its hands may be somebody else's file by then
        ours.close()


def _sent(channel: Connection, asked: object) -> None:
    with contextlib.suppress(OSError):  # the wait for an answer says that nobody is there
        channel.send(asked)


def _serve(channel: Connection) -> None:
    """The child: one model."""
    try:
        from pipeline.infer import Segmenter  # torch: here only

        bundle, config = channel.recv()
        channel.send(Segmenter.of(bundle, SegmentConfig.model_validate_json(config)).found())
    except EOFError:  # nobody waits any more
        return
    except Exception as error:  # noqa: BLE001 - the parent raises it
        channel.send(told(error))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the parent, where one ends them all
    _serve(Connection(int(sys.argv[1])))
