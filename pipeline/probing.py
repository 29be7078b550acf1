"""A model probed in a process of its own, while Ray starts on the same machine (cluster.py).

Ray's start waits more than it works. A first worker would import torch only after it, and begin
four seconds later (2 cores, 2026-11-30).
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from pipeline.apart import spoken_with, told
from pipeline.bound import bound
from pipeline.config import SegmentConfig
from pipeline.errors import RunUnfinished
from pipeline.place import Found


@contextlib.contextmanager
def probed(
    bundle: tuple[bytes, bytes], config: SegmentConfig
) -> Iterator[Callable[[float], Found]]:
    """Begin; what it gives waits so many seconds for the answer.

    Args:
        bundle: model.json and weights.safetensors.
        config: the run's.

    Raises:
        RunRefused: the bundle cannot be used; by the call, as are:
        RunUnfinished: the process ended or was too slow.
        MemoryError: it had too little.
    """
    process, ours = spoken_with(["pipeline.probing"], bound)

    def answer(patience_s: float) -> Found:
        try:
            if not ours.poll(patience_s):
                raise RunUnfinished(
                    f"the model was not probed after {patience_s:g} s (--compute.no-progress-s); "
                    "run the same command again"
                )
            said = ours.recv()
        except (EOFError, ConnectionError) as error:
            raise RunUnfinished(
                f"the process that was to probe the model ended (exit {process.wait()}); did it "
                "lack memory? Run the same command again"
            ) from error
        if isinstance(said, Exception):
            raise said
        return said

    try:
        with contextlib.suppress(ConnectionError):  # the answer says that it is gone
            ours.send((bundle, config.model_dump_json()))
        yield answer
    finally:
        process.kill()
        process.wait()
        ours.close()


def _serve(channel: Connection) -> None:
    """The child: one model."""
    try:
        bundle, config = channel.recv()
        from pipeline.infer import Segmenter  # torch: here only

        channel.send(Segmenter.of(bundle, SegmentConfig.model_validate_json(config)).found())
    except EOFError:  # nobody waits any more
        return
    except Exception as error:  # noqa: BLE001 - the parent raises it
        channel.send(told(error))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the parent, where one ends them all
    _serve(Connection(int(sys.argv[1])))
