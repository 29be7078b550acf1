"""A fragment whose first attempt did not end: each image in a child process that may die.

Before work on a fragment begins, its attempt is written down (`Ledger.begin_attempt`). If an
earlier one is there and no commit, something killed it: perhaps the machine, perhaps one of the
images. So every image is decoded and predicted alone in a child with limits on time and memory. The
one that kills or hangs its child is rejected; a new child goes on with the next. The answers are
the same as in company (they never depend on batch mates); only slower.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from pipeline.clock import Clock
from pipeline.config import Compute
from pipeline.errors import Reason, Station
from pipeline.line import Line
from pipeline.measure import MeasuredMask, RejectedImage, Result
from pipeline.records import EncodedImage, Verdict

READY_S = 120.0  # a child loads torch and the model: seconds, a minute on a crowded machine


def segment_carefully(encoded: Iterable[EncodedImage], line: Line, slots: int) -> Iterator[Result]:
    """Answers in plan order; images without bytes are answered here.

    Args:
        encoded: a fragment's images.
        line: the run's line.
        slots: slots of the fragment; each answer leaves fewer for those after it.
    """
    compute, child = line.config.compute, None
    try:
        for item in encoded:
            if item.data is None:
                verdict = item.verdict or Verdict("fetch", "unreadable", "no bytes came")
                yield RejectedImage(item.plan, verdict)
                continue
            child = (
                child
                if child is not None and child.alive
                else _Child(line.ledger.store.uri, compute)
            )
            result = child.answer(item, slots, compute.image_timeout_s)
            if isinstance(result, MeasuredMask) and result.path is None:
                slots -= line.ledger.layout.slots_for(result.height, result.width) or 0
            yield result
    finally:
        if child is not None:
            child.end()


class _Child:
    """A process that answers one image at a time."""

    def __init__(self, run_uri: str, compute: Compute) -> None:
        self._ours, theirs = Pipe()
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "pipeline.careful", run_uri, compute.model_dump_json()]
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        if not self._ours.poll(READY_S) or self._received() != "ready":
            self.end()
            raise RuntimeError(f"the child process did not start (exit {self._process.poll()})")

    @property
    def alive(self) -> bool:
        """Whether it can take another image."""
        return self._process.poll() is None

    def answer(self, item: EncodedImage, slots: int, timeout_s: float) -> Result:
        """One image's answer, or its rejection if the child dies or is late."""
        self._ours.send((item, slots))
        station: Station = "decode"
        while True:
            if not self._ours.poll(timeout_s):
                self.end()
                verdict = Verdict(
                    station, "timeout", f"no answer after {timeout_s:g} s, alone in a process"
                )
                return RejectedImage(item.plan, verdict, len(item.data or b""))
            said = self._received()
            if said is None:
                code = self._process.wait()
                reason: Reason = "killed_decode" if station == "decode" else "killed_predict"
                verdict = Verdict(
                    station, reason, f"ended its process twice, the second time with exit {code}"
                )
                return RejectedImage(item.plan, verdict, len(item.data or b""))
            if isinstance(said, str):
                station = "predict"
                continue
            return said

    def _received(self) -> "Result | str | None":
        """What the child says; None when it is gone."""
        try:
            return self._ours.recv()
        except (EOFError, ConnectionError):
            return None

    def end(self) -> None:
        """Stop it at once; it holds nothing."""
        self._process.kill()
        self._process.wait()
        self._ours.close()


def _serve(run_uri: str, compute: Compute, channel: Connection) -> None:
    """The child: answer images until the parent closes the channel."""
    from pipeline.run import answer  # run imports this file

    line = Line.open(run_uri, compute)
    segmenter = line.segmenter()
    _limit_memory(compute.image_memory_mb)
    channel.send("ready")

    def announced(item: EncodedImage, tell: Callable[[str], None]) -> Iterator[EncodedImage]:
        yield item
        tell("decoded")  # asked for the next one: this one has pixels

    while True:
        try:
            item, slots = channel.recv()
        except EOFError:
            return
        results = answer(announced(item, channel.send), line, segmenter, Clock(), slots)
        channel.send(next(iter(results)))


def _limit_memory(megabytes: int) -> None:
    """Bound the heap this process may still take."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = taken + megabytes * 1024**2
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    _serve(sys.argv[1], Compute.model_validate_json(sys.argv[2]), Connection(int(sys.argv[3])))
