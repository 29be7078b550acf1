"""Encoded images to upright pictures, decoded a little ahead of the model in threads."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.decode import DecodeLimits, decode
from pipeline.errors import ImageRejected
from pipeline.line import Line
from pipeline.measure import RejectedImage
from pipeline.records import EncodedImage, Pixels, Verdict
from pipeline.tile import Picture


def decoded(
    encoded: Iterable[EncodedImage], line: Line, aside: list[RejectedImage], left: int
) -> Iterator[Picture]:
    """Pictures in plan order; what is none goes aside.

    Args:
        encoded: images of one fragment, in plan order.
        line: the run's line.
        aside: takes the rejected ones.
        left: slots the fragment has left; a picture that needs more becomes large.
    """
    layout = line.ledger.layout
    for item, digest, outcome in _ahead(encoded, line.limits, line.config.compute.decode_threads):
        size = None if item.data is None else len(item.data)
        if isinstance(outcome, Verdict):
            aside.append(RejectedImage(item.plan, outcome, size, digest))
            continue
        need = layout.slots_for(outcome.height, outcome.width)
        large = need is None or need > min(left, max(1, layout.slots // 4))
        left -= 0 if large or need is None else need
        rows, columns = line.grid.offsets(outcome.height), line.grid.offsets(outcome.width)
        yield Picture(item.plan, outcome, size or 0, digest or "", large, rows, columns)


Decoded = tuple[EncodedImage, str | None, Pixels | Verdict]


def _ahead(
    encoded: Iterable[EncodedImage], limits: DecodeLimits, threads: int
) -> Iterator[Decoded]:
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[Decoded]] = deque()
        for item in encoded:
            waiting.append(pool.submit(_decoded, item, limits))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decoded(item: EncodedImage, limits: DecodeLimits) -> Decoded:
    if item.data is None:
        return item, None, item.verdict or Verdict("fetch", "unreadable", "no bytes came")
    digest = hashlib.sha256(item.data).hexdigest()
    try:
        return item, digest, decode(item.data, limits)
    except ImageRejected as verdict:
        return item, digest, Verdict(verdict.station, verdict.reason, verdict.detail)
