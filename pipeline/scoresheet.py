"""A sheet of pictures: what they are, what the model says, and where the two differ.

Shapes: H, W of a picture.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import overview
from pipeline.keys import printable
from pipeline.ontology import Ontology
from pipeline.overview import CAPTION, GAP, INK, LEGEND, PAPER
from pipeline.records import Array

SHOWN = 4
"""Pictures of each kind: worst, best, random."""
PANELS = ("picture", "truth", "answer", "errors")
RIGHT, WRONG, IGNORED = (225, 225, 225), (214, 39, 40), (250, 250, 250)


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One row of the sheet, as small as it is shown."""

    title: str
    panels: tuple[Image.Image, ...]

    @classmethod
    def of(
        cls, title: str, pixels_HWC: Array, labels_HW: Array, answers_HW: Array, ontology: Ontology
    ) -> "Shown":
        """The picture, its labels and answers (class indexes), and where they differ."""
        if labels_HW.size == 1:  # of the whole picture: a colour tells less than its name
            names = ontology.names
            title += f"  is {names[labels_HW.item()]}, called {names[answers_HW.item()]}"
        classes = _classes(ontology)
        masks = (overview.painted(mask_HW, classes) for mask_HW in (labels_HW, answers_HW))
        panels = (*masks, errors(labels_HW, answers_HW, ontology.ignored))
        small = (overview.fitted(panel, Image.Resampling.NEAREST) for panel in panels)
        picture = overview.fitted(overview.rgb(pixels_HWC), Image.Resampling.BOX)
        return cls(title, (picture, *small))


def sheet(rows: Sequence[Shown], ontology: Ontology) -> bytes:
    """A PNG: picture, truth, answer and error map side by side, a row for each picture."""
    side = overview.SIDE
    size = len(PANELS) * (side + GAP) + GAP, LEGEND + len(rows) * (side + CAPTION + GAP) + GAP
    image = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    overview.legend(pen, font, _classes(ontology))
    for number, row in enumerate(rows):
        top = LEGEND + GAP + number * (side + CAPTION + GAP)
        pen.text((GAP, top), printable(row.title, 120), INK, font)
        for column, (name, panel) in enumerate(zip(PANELS, row.panels, strict=True)):
            left = GAP + column * (side + GAP)
            pen.text((left, top + 16), name, INK, font)
            overview.paste(image, panel, left, top + CAPTION)
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    return sink.getvalue()


def errors(labels_HW: Array, answers_HW: Array, ignored: int) -> Array:
    """Wrong pixels red, right ones gray, ignored ones white: [H, W, 3] uint8."""
    kind_HW = np.where(labels_HW == answers_HW, 0, 1)
    kind_HW[labels_HW == ignored] = 2
    return np.array([RIGHT, WRONG, IGNORED], np.uint8)[kind_HW]


def _classes(ontology: Ontology) -> list[dict[str, Any]]:
    """As `painted` wants them, with the indexes as ids."""
    return [{**asdict(entry), "id": place} for place, entry in enumerate(ontology.classes)]
