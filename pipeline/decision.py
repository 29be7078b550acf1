"""A decision about a candidate: what it rests on, and its record for people and for programs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.errors import RunRefused
from pipeline.keys import printable

Verdict = Literal["promote", "refuse", "undecided"]

FORMAT_VERSION = 1
ROWS = 40  # reasons on the one page; the JSON beside it has every one
IMAGES = 5  # that changed most, on a terminal


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a candidate must show. 0.01 is one point of IoU; falls are below the champion."""

    margin: float = 0.002
    """The interval of the difference in mIoU must lie above this. A fifth of a point: less is not
    worth a new model. A negative margin takes a candidate that is no worse than that."""
    confidence: float = 0.95
    """Share of the resampled differences that make the interval."""
    resamples: int = 2000
    """Resamples of the images."""
    seed: int = 0
    """Of the resampling: equal tables and rules give equal decisions."""
    stratified: bool = False
    """Draw within each stratum, so that every resample has as many images of each."""
    images: int = 30
    """With fewer labelled images nothing is promoted: an interval means little then."""
    class_floor: float = 0.02
    """No class may lose more IoU than this."""
    stratum_floor: float = 0.02
    """No stratum may lose more mIoU than this."""
    part_images: int = 10
    """A class or stratum in fewer images is not judged."""
    part_pixels: int = 1000
    """A class or stratum with fewer labelled pixels is not judged."""
    least_miou: float | None = None
    """The candidate's mIoU must reach this, champion or not."""
    least_iou: dict[str, float] = field(default_factory=dict)
    """The IoU that these classes must reach, by name."""
    calibration: float = 0.02
    """The expected calibration error may rise by this much."""
    slowdown: float = 1.5
    """Seconds per megapixel may be so many times the champion's."""
    flips: float | None = None
    """Share of the pixels of unlabelled canaries that may change their class."""

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise RunRefused(f"--rules.confidence {self.confidence} must be above 0.5 and below 1")
        least = {
            "resamples": 100,  # the ends of an interval rest on the outermost of them
            "images": 2,
            "part_images": 2,
            "part_pixels": 1,
            "class_floor": 0,
            "stratum_floor": 0,
            "calibration": 0,
            "slowdown": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                flag = f"--rules.{name.replace('_', '-')}"
                raise RunRefused(f"{flag} {getattr(self, name)} must be {low} or more")


@dataclass(frozen=True, slots=True)
class Reason:
    """One line of a decision: a figure, how sure it is, and what it had to keep to."""

    name: str
    value: float | None
    limit: float | None
    ok: bool | None
    """None: the images do not tell, or nothing was judged."""
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """An image and its mIoU before and after."""

    key: str
    champion: float
    candidate: float
    difference: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer, with everything it rests on."""

    verdict: Verdict
    reasons: tuple[Reason, ...]
    changed: tuple[Changed, ...]
    """Those that changed most."""
    images: int
    champion_miou: float | None
    candidate_miou: float
    probability: float | None
    """Share of the resamples in which the candidate is better (a draw counts half)."""
    rules: Rules


# ------------------------------------------------------------------------------------- the record


def decision_record(decision: Decision, about: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """A decision as one page of Markdown and as JSON.

    Args:
        decision: what `promotion.judge` said.
        about: whose it is: candidate, champion, alias, evaluation set, time, reason.
    """
    record = {"format_version": FORMAT_VERSION, **about, **asdict(decision)}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    page = "\n".join(_page(decision, about))
    return f"{page}\n".encode(), f"{text}\n".encode("utf-8", "replace")


def _page(decision: Decision, about: Mapping[str, Any]) -> Iterator[str]:
    before = "none" if decision.champion_miou is None else f"{decision.champion_miou:.4f}"
    rows = rows_of(decision)
    yield f"# {decision.verdict}"
    yield ""
    yield from (f"- {name}: {_cell(value)}" for name, value in about.items() if value is not None)
    yield f"- mIoU: {before} → {decision.candidate_miou:.4f} on {decision.images} images"
    yield ""
    yield f"| {' | '.join(HEAD)} |"
    yield f"|{'---|' * len(HEAD)}"
    yield from (f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)
    if len(rows) < len(decision.reasons):
        yield ""
        yield f"{len(decision.reasons) - len(rows)} more are in decision.json; none is broken."
    if decision.changed:
        yield ""
        yield "## Images that changed most"
        yield ""
        yield "| image | champion | candidate | difference |"
        yield "|---|---|---|---|"
        for image in decision.changed:
            figures = f"{image.champion:.4f} | {image.candidate:.4f} | {image.difference:+.4f}"
            yield f"| {_cell(image.key)} | {figures} |"


HEAD = ("", "what", "value", "interval", "limit", "")


def rows_of(decision: Decision) -> list[tuple[str, ...]]:
    """The reasons as text: what is broken first; where there are many, not all that hold."""
    broken = [reason for reason in decision.reasons if reason.ok is False]
    others = [reason for reason in decision.reasons if reason.ok is not False]
    chosen = [*broken, *others[: max(0, ROWS - len(broken))]]
    return [_row(reason) for reason in chosen]


def as_text(decision: Decision) -> list[str]:
    """The reasons and the images that changed most, as lines for a terminal."""
    rows = [HEAD, *rows_of(decision)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
    lines = ["  ".join(cells).rstrip() for cells in padded]
    changed = [
        f"  {printable(image.key)}  {image.champion:.4f} → {image.candidate:.4f}"
        for image in decision.changed[:IMAGES]
    ]
    return [*lines, "images that changed most:", *changed] if changed else lines


def _row(reason: Reason) -> tuple[str, ...]:
    word = {True: "ok", False: "broken", None: "open"}[reason.ok]
    if reason.low is None or reason.high is None:
        return word, reason.name, _figure(reason.value), "", _figure(reason.limit), reason.note
    interval = f"{reason.low:+.4f} … {reason.high:+.4f}"
    value, limit = (
        "" if figure is None else f"{figure:+.4f}" for figure in (reason.value, reason.limit)
    )
    return word, reason.name, value, interval, limit, reason.note


def _figure(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _cell(value: object) -> str:
    """Text that stays in its cell: the names of images are anybody's."""
    return "".join(f"&#{ord(c)};" if c in "|<>&`[]*_\\" else c for c in printable(str(value)))
