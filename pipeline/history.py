"""What a training looked like, step by step: rows on storage, a table, and curves for people.

Rows are written beside the checkpoints, a stretch of steps an object. After a restart a stretch is
done again and its rows come twice; the later ones count.
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import StorageMissing
from pipeline.overview import INK, PAPER
from pipeline.records import Array
from pipeline.storage import Store

FOLDER = "history"
SIZE = 560, 300  # of one chart, in pixels
LEFT, TOP, RIGHT, BOTTOM = 64, 30, 16, 34  # around its axes
LINE, MARK, GRID = (31, 119, 180), (214, 39, 40), (225, 225, 225)
SMOOTHED = 50  # the bold line of a curve is a mean over this share of it: 1/50


@dataclass(frozen=True, slots=True)
class Row:
    """A step."""

    step: int
    """Counted from 1."""
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    """Since the training began, without the time between two calls."""
    miou: float | None = None
    """Of the averaged weights on the pictures held out, where it was measured after this step."""


SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        *(
            pa.field(name, pa.float64(), nullable=False)
            for name in ("loss", "learning_rate", "gradient_norm", "seconds")
        ),
        pa.field("miou", pa.float64()),
    ]
)


def keep(store: Store, rows: Sequence[Row]) -> None:
    """Write a stretch of steps."""
    if rows:
        name = f"{FOLDER}/{rows[0].step:09d}-{rows[-1].step:09d}.json"
        store.replace(name, json.dumps([asdict(row) for row in rows]).encode())


def kept(store: Store, until: int | None = None) -> list[Row]:
    """The rows of all steps, up to one of them."""
    rows: dict[int, Row] = {}
    try:
        found = sorted(store.list(FOLDER), key=lambda each: (each.mtime, each.path))
    except StorageMissing:
        found = []
    for path in (each.path for each in found):
        if re.fullmatch(rf"{FOLDER}/\d{{9}}-\d{{9}}\.json", path):
            rows |= {said["step"]: Row(**said) for said in json.loads(store.read(path))}
    return [rows[step] for step in sorted(rows) if until is None or step <= until]


def table_of(rows: Iterable[Row]) -> pa.Table:
    """One row a step."""
    return pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA)


def curves(rows: Sequence[Row], title: str) -> bytes:
    """A PNG: loss, mIoU, learning rate and gradient norm over the steps."""
    image = Image.new("RGB", (2 * SIZE[0], 2 * SIZE[1] + 24), PAPER)
    ImageDraw.Draw(image).text((LEFT, 6), title, INK, ImageFont.load_default(15))
    steps = np.array([row.step for row in rows], float)
    scored = [row for row in rows if row.miou is not None]
    charts = (
        ("loss", steps, np.array([row.loss for row in rows])),
        (
            "mIoU of the pictures held out, %",
            np.array([row.step for row in scored], float),
            np.array([100 * (row.miou or 0) for row in scored]),
        ),
        ("learning rate", steps, np.array([row.learning_rate for row in rows])),
        ("gradient norm", steps, np.array([row.gradient_norm for row in rows])),
    )
    for place, (name, x, y) in enumerate(charts):
        row, column = divmod(place, 2)
        chart = _chart(name, x, y, float(steps[-1]) if steps.size else 1.0)
        image.paste(chart, (column * SIZE[0], 24 + row * SIZE[1]))
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def _chart(name: str, x: Array, y: Array, last: float) -> Image.Image:
    """One curve with its axes."""
    image = Image.new("RGB", SIZE, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    pen.text((LEFT, 8), name, INK, font)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
    good = np.isfinite(y)
    x, y = x[good], y[good]
    low, high = float(y.min(initial=0.0)), float(y.max(initial=0.0))
    high = high if low < high else 1.0
    for tick in np.linspace(low, high, 5):
        level = TOP + height * (1 - (tick - low) / (high - low))
        pen.line((LEFT, level, LEFT + width, level), GRID)
        pen.text((LEFT - 6, level), f"{tick:.3g}", INK, font, anchor="rm")
    for tick in np.linspace(0, last, 5):
        place = LEFT + width * tick / max(last, 1)
        pen.text((place, TOP + height + 8), f"{tick:.0f}", INK, font, anchor="ma")
    points_P2 = np.stack(
        [LEFT + width * x / max(last, 1), TOP + height * (1 - (y - low) / (high - low))], axis=1
    )
    few = len(points_P2) <= 2 * SMOOTHED
    if len(points_P2) > 1:
        pen.line([tuple(p) for p in points_P2.tolist()], LINE if few else _pale(LINE), 1)
    if few:
        for px, py in points_P2.tolist():
            pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill=MARK)
    else:
        pen.line([tuple(p) for p in _smoothed(points_P2).tolist()], LINE, 2)
    return image


def _smoothed(points_P2: Array) -> Array:
    """A running mean of the heights, as wide as its place allows."""
    wide = max(1, len(points_P2) // SMOOTHED)
    sums = np.concatenate([[0.0], np.cumsum(points_P2[:, 1])])
    at = np.arange(len(points_P2))
    low, high = np.maximum(at - wide, 0), np.minimum(at + wide + 1, len(points_P2))
    return np.stack([points_P2[:, 0], (sums[high] - sums[low]) / (high - low)], axis=1)


def _pale(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(255 - (255 - part) // 3 for part in colour)
