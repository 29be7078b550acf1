"""What travels along the line: frozen records, named by nouns.

Shapes: H, W are the height and width of the upright image in pixels; C is 1 (gray) or 3 (RGB).
"""

from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import Reason, Station

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One row of the plan: an image by name, not yet looked at."""

    image_id: int
    key: str
    """Path below the source root, plus ``#member``; the image's identity (see pipeline/keys.py)."""
    uri: str
    """The object that holds it."""
    member: str | None
    """Name of the tar member, or ordinal of the table row; None for a loose file."""
    offset: int | None
    """First byte of the member inside the object; None for a loose file or a table row."""
    nbytes: int
    """Encoded size in bytes (an estimate for table rows)."""
    etag: str
    """The object's version as its store tells it: the ETag, or ``mtime-size`` of a local file."""
    format: str
    """Which file of pipeline/formats/ fetches it."""
    fragment: int
    problem: str | None = None
    """``reason: detail`` where planning already knows that there will be no mask."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why an image has no mask."""

    station: Station
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as it lies in the archive: encoded bytes, or why there are none."""

    plan: PlannedImage
    data: bytes | None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded, upright picture."""

    values_HWC: Array
    """uint8 or uint16, C = 1 or 3."""
    nodata_HW: Array | None
    """bool, True where there is nothing to classify (fully transparent); None = everywhere data."""
    whole: tuple[int, int] | None = None
    """Height and width of the upright picture, where it was decoded smaller."""

    @property
    def height(self) -> int:
        """H, in pixels."""
        return self.values_HWC.shape[0]

    @property
    def width(self) -> int:
        """W, in pixels."""
        return self.values_HWC.shape[1]


@dataclass(frozen=True, slots=True)
class Task:
    """A fragment to be done: where its plan lies."""

    fragment: int
    round: int
    row_group: int
    images: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a fragment."""

    fragment: int
    done: int
    rejected: int
    pixels: int
    bytes_in: int
    bytes_out: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Per leg, on the wall."""
    busy: dict[str, float] = field(default_factory=dict)
    """Per stage, of a core; `device`: of the GPU."""
    passed: dict[str, int] = field(default_factory=dict)
    """`Clock.passed`."""
    peak_mb: float = 0.0
    """Of the process that segmented it, so far."""
    adopted: bool = False
    """Another writer's object was there first; the counts are ours, the truth is its header."""
