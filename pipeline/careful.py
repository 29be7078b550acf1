"""A fragment whose first attempt did not end: each image in a child process that may die.

Before work on a fragment begins, its attempt is written down (`Ledger.begin_attempt`). If an
earlier one is there and no commit, something killed it: perhaps the machine, perhaps one of the
images. So every image is decoded and predicted alone in a child with limits on time and memory. The
one that kills or hangs its child, or asks for more memory, is rejected; a new child goes on with
the next. The answers are the same as in company (they never depend on batch mates); only slower.

Only a process that died is a kill. What a child raises (a store that is down while it writes a
large mask, a bug) is not the image's fault and is raised here as it is.
"""

import signal
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection

from pipeline.apart import limit_memory, spoken_with, told
from pipeline.bound import bound
from pipeline.clock import Clock
from pipeline.config import Compute
from pipeline.errors import Reason, RunUnfinished, Station
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

    Raises:
        RunUnfinished: if a child cannot start.
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
        command = ["pipeline.careful", run_uri, compute.model_dump_json()]
        self._process, self._ours = spoken_with(command, bound)
        try:
            if self._ours.poll(READY_S):
                self._heard()
                return
            why = f"was not ready after {READY_S:g} s"
        except EOFError:
            why = f"ended before it could begin (exit {self._process.wait()})"
        except MemoryError:
            why = "had too little memory to begin"
        except BaseException:
            self.end()
            raise
        self.end()
        raise RunUnfinished(
            f"the process that was to answer images one by one {why}; it holds the model once "
            "more: run the same command again with fewer --compute.workers, or more memory"
        )

    @property
    def alive(self) -> bool:
        """Whether it can take another image."""
        return self._process.poll() is None

    def answer(self, item: EncodedImage, slots: int, timeout_s: float) -> Result:
        """One image's answer, or its rejection if the child dies, is late or wants more memory."""
        try:
            self._ours.send((item, slots))
        except ConnectionError as error:  # it had answered all it was given: no image's fault
            raise RunUnfinished(
                "a process that answers images one by one died between two of them; "
                "run the same command again"
            ) from error
        station: Station = "decode"
        deadline = time.monotonic() + timeout_s
        try:
            while self._ours.poll(max(0.0, deadline - time.monotonic())):
                said = self._heard()
                if not isinstance(said, str):
                    return said
                station = "predict"
        except EOFError:
            code = self._process.wait()
            why = f"ended its process twice, the second time with exit {code}"
            return _killed(item, station, why)
        except MemoryError as error:
            self.end()
            return _killed(item, station, f"needs more memory than it may have alone: {error}")
        self.end()
        why = f"no answer after {timeout_s:g} s, alone in a process"
        return _rejected(item, Verdict(station, "timeout", why))

    def _heard(self) -> "Result | str":
        """What the child says.

        Raises:
            EOFError: it is gone.
            Exception: what it raised.
        """
        try:
            said = self._ours.recv()
        except ConnectionError as error:
            raise EOFError from error
        if isinstance(said, Exception):
            raise said
        return said

    def end(self) -> None:
        """Stop it at once; it holds nothing."""
        self._process.kill()
        self._process.wait()
        self._ours.close()


def _killed(item: EncodedImage, station: Station, why: str) -> RejectedImage:
    reason: Reason = "killed_decode" if station == "decode" else "killed_predict"
    return _rejected(item, Verdict(station, reason, why))


def _rejected(item: EncodedImage, verdict: Verdict) -> RejectedImage:
    return RejectedImage(item.plan, verdict, len(item.data or b""))


class _TellingClock(Clock):
    """A clock that tells the parent when an image has been decoded."""

    def __init__(self, channel: Connection) -> None:
        super().__init__()
        self._channel = channel

    def work(self, name: str, seconds: float) -> None:
        """See `Clock.work`: each picture's decoding is booked when it is done (pictures.py)."""
        super().work(name, seconds)
        if name == "decode":
            self._channel.send("decoded")


def _serve(run_uri: str, compute: Compute, channel: Connection) -> None:
    """The child: answer images until the parent closes the channel, or one raises."""
    try:
        _answer(run_uri, compute, channel)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        channel.send(told(error))


def _answer(run_uri: str, compute: Compute, channel: Connection) -> None:
    from pipeline.run import answer  # run imports this file

    line = Line.open(run_uri, compute)
    segmenter = line.segmenter()
    limit_memory(compute.image_memory_mb)
    channel.send("ready")
    while True:
        try:
            item, slots = channel.recv()
        except EOFError:
            return
        results = answer([item], line, segmenter, _TellingClock(channel), slots)
        channel.send(next(iter(results)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the parent, where one ends them all
    _serve(sys.argv[1], Compute.model_validate_json(sys.argv[2]), Connection(int(sys.argv[3])))
