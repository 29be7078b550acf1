"""overview.png: pictures, masks and overlays of a finished run, side by side, for the eye.

Of a classifying run: pictures and their classes.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import ImageRejected, StorageError
from pipeline.keys import printable
from pipeline.reader import Run
from pipeline.records import Array

SHOWN = 8  # rows: one screen
SIDE = 256  # pixels of a cell
GAP, CAPTION, LEGEND = 12, 34, 30
ACROSS = 4  # pictures in a row where there are no masks beside them
MOST_PIXELS = (
    16_000_000  # larger pictures are left out: fetching one again could cost more than the sheet
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
T = TypeVar("T")
INK, PAPER, NOTHING = (30, 30, 30), (255, 255, 255), (200, 200, 200)


def overview(run: Run) -> bytes | None:
    """A PNG of up to eight images spread over the run; None if none can be shown."""
    if run.ledger.layout.has_masks:
        masks = _shown(run, run.mask_of)
        sheet = _with_masks(masks, run.classes) if masks else None
    else:
        labels = _shown(run, run.prediction_of)
        sheet = _with_labels(labels) if labels else None
    if sheet is None:
        return None
    sink = io.BytesIO()
    sheet.save(sink, "PNG", compress_level=3)  # 6 is twice as long for 4 % less, optimize ten times
    return sink.getvalue()


def _shown(run: Run, answer: Callable[[dict[str, Any]], T]) -> list[tuple[str, Array, T]]:
    """Keys, pictures and answers."""
    shown = []
    for row in _chosen(run):
        try:
            shown.append((row["key"], rgb(run.picture_of(row)), answer(row)))
        except (ImageRejected, StorageError):  # gone since: another one is shown in its place
            continue
        if len(shown) == SHOWN:
            break
    return shown


def _with_masks(
    shown: list[tuple[str, Array, Array]], classes: list[dict[str, Any]]
) -> Image.Image:
    """A row for each: the picture, its mask, both."""
    sheet = Image.new(
        "RGB", (3 * SIDE + 4 * GAP, LEGEND + len(shown) * (SIDE + CAPTION + GAP) + GAP), PAPER
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    legend(pen, font, classes)
    for number, (key, picture, mask) in enumerate(shown):
        top = LEGEND + GAP + number * (SIDE + CAPTION + GAP)
        colours = painted(mask, classes)
        tinted = colours.any(axis=2, keepdims=True)  # what is black in the mask stays as it is
        overlay = np.where(tinted, picture * 0.55 + colours * 0.45, picture).astype(np.uint8)
        for column, cell in enumerate((picture, colours, overlay)):
            small = fitted(cell, Image.Resampling.NEAREST if column == 1 else Image.Resampling.BOX)
            paste(sheet, small, GAP + column * (SIDE + GAP), top + CAPTION)
        pen.text((GAP, top), printable(key, 60), INK, font)
        pen.text((GAP, top + 16), _shares(mask, classes), INK, font)
    return sheet


def _with_labels(shown: list[tuple[str, Array, dict[str, Any]]]) -> Image.Image:
    """Pictures in rows, under each its key, class and confidence."""
    down, across = -(-len(shown) // ACROSS), min(ACROSS, len(shown))
    size = (across * (SIDE + GAP) + GAP, down * (SIDE + CAPTION + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for number, (key, picture, said) in enumerate(shown):
        left = GAP + number % ACROSS * (SIDE + GAP)
        top = GAP + number // ACROSS * (SIDE + CAPTION + GAP)
        paste(sheet, fitted(picture, Image.Resampling.BOX), left, top)
        label = f"{printable(said['name'], 20)} {100 * said['confidence']:.1f} %"
        pen.text((left, top + SIDE + 2), label, INK, font)
        pen.text((left, top + SIDE + 18), printable(key, 30), INK, font)
    return sheet


def paste(sheet: Image.Image, small: Image.Image, left: int, top: int) -> None:
    """In the middle of a cell."""
    sheet.paste(small, (left + (SIDE - small.width) // 2, top + (SIDE - small.height) // 2))


def _chosen(run: Run) -> list[dict[str, Any]]:
    """Images rows spread evenly, with spares behind them."""
    about = run.columns(["status", "height", "width"])
    pixels = pc.multiply(about["height"].cast(pa.int64()), about["width"])
    small = pc.and_kleene(pc.equal(about["status"], "done"), pc.less_equal(pixels, MOST_PIXELS))
    fit = np.flatnonzero(small).tolist()
    spread = [fit[i * len(fit) // SHOWN] for i in range(SHOWN)] if len(fit) > SHOWN else fit
    return run.rows(list(dict.fromkeys([*spread, *fit[: 2 * SHOWN]])))


def painted(mask: Array, classes: list[dict[str, Any]]) -> Array:
    """A mask in the ontology's colours, [H, W, 3] uint8; no data is light gray."""
    table = np.full((int(np.iinfo(mask.dtype).max) + 1, 3), NOTHING, np.uint8)
    for entry in classes:
        table[entry["id"]] = entry["color"]
    return table[mask]


def rgb(values_HWC: Array) -> Array:
    """8-bit RGB to look at; 16-bit pictures are stretched to their own range for the eye only."""
    if values_HWC.dtype != np.uint8:
        lo, hi = int(values_HWC.min()), int(values_HWC.max())
        values_HWC = ((values_HWC.astype(np.float32) - lo) * (255 / max(1, hi - lo))).astype(
            np.uint8
        )
    return np.repeat(values_HWC, 3, axis=2) if values_HWC.shape[2] == 1 else values_HWC


def fitted(cell: Array, how: Image.Resampling) -> Image.Image:
    """As large as a cell allows."""
    image = Image.fromarray(cell)
    scale = SIDE / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), how
    )


def _shares(mask: Array, classes: list[dict[str, Any]]) -> str:
    counts = np.bincount(mask.ravel(), minlength=int(np.iinfo(mask.dtype).max) + 1)
    data = max(1, int(sum(counts[entry["id"]] for entry in classes)))
    first = sorted(classes, key=lambda entry: -counts[entry["id"]])[:3]
    text = "  ".join(
        f"{entry['name']} {100 * counts[entry['id']] / data:.1f} %"
        for entry in first
        if counts[entry["id"]]
    )
    return f"{mask.shape[1]} x {mask.shape[0]}   {printable(text, 90)}"


def legend(pen: ImageDraw.ImageDraw, font: Font, classes: list[dict[str, Any]]) -> None:
    """Names and colours of the classes in one line at the top, as many as fit."""
    left = GAP
    for entry in classes:
        name = printable(entry["name"], 20)
        wide = int(pen.textlength(name, font)) + 34
        if left + wide > 3 * SIDE + 4 * GAP:
            return
        pen.rectangle((left, GAP, left + 14, GAP + 14), tuple(entry["color"]), INK)
        pen.text((left + 20, GAP - 2), name, INK, font)
        left += wide
