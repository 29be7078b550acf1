"""Labelled pictures as a training wants them: any part of any step, on any machine.

Which pictures a step sees, and how each is cut, turned and coloured, follows from the seed and the
step alone. So a part can be made anywhere, in any order and again, and a training that is taken up
needs no state of its data.

A classifier is shown whole pictures at the size at which it reads them (pipeline/scaling.py), and
windows of these.

Shapes: B pictures of a part, H, W of the upright picture, h, w of what is shown, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from models import Bundle, InputInfo, TileInfo
from models.training.augment import drawing
from models.training.recipes import Recipe
from pipeline.decode import Reads
from pipeline.errors import ImageRejected
from pipeline.labels import LabelledItem, Loader
from pipeline.patience import patiently
from pipeline.records import Array
from pipeline.scaling import size_read

CARD_TILE = TileInfo(size=1024, overlap=128)  # as the demo bundle: what fits a small GPU
ORDER, VIEW = 1, 2  # what is drawn: the order of an epoch, how a picture is seen
LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601-2, as inference reads colour as gray (infer.py)."""


class Part(NamedTuple):
    """What one worker puts through the model at once."""

    step: int
    """Counted from 0."""
    pixels_BhwC: Array
    """uint8."""
    labels: Array
    """Bhw, or B for a classifier: places among the model's scores; the recipe's ignore_id where
    there is nothing to learn."""
    rejected: tuple[tuple[str, str, str, str], ...]
    """Key, station, reason and detail of pictures that cannot be read: blank, nothing to learn."""


@dataclass(frozen=True)
class TrainSet:
    """Endless pictures in an order of their own every epoch; holds no bytes of any."""

    items: Sequence[LabelledItem]
    loader: Loader
    recipe: Recipe
    about: InputInfo
    """What the model reads."""
    place: tuple[int, ...]
    """Place among the scores of each class of the ontology."""
    longest: int | None = None
    """Of a classifier: the longer side, in pixels, of what it reads at most."""

    @classmethod
    def of(
        cls, items: Sequence[LabelledItem], loader: Loader, recipe: Recipe, card: Bundle
    ) -> "TrainSet":
        """The pictures for the model of a card, whose classes have the ontology's names."""
        names = [entry.name for entry in card.classes]
        place = tuple(names.index(name) for name in loader.ontology.names)
        tile = card.tile or CARD_TILE
        longest = tile.size if card.task == "classify" else None
        return cls(items, loader, recipe, card.input, place, longest)

    def part(self, step: int, slot: int, parts: int) -> Part:
        """One of the parts of a step.

        Args:
            step: counted from 0.
            slot: which part.
            parts: how many the step has.
        """
        size = self.recipe.batch // parts
        first = step * self.recipe.batch + slot * size
        seen = [self._seen(first + offset) for offset in range(size)]
        pixels, labels, rejected = zip(*seen, strict=True)
        return Part(step, np.stack(pixels), np.stack(labels), tuple(r for r in rejected if r))

    def _seen(self, position: int) -> tuple[Array, Array, tuple[str, str, str, str] | None]:
        """The picture at a place of the endless sequence, as the model will see it."""
        epoch, place = divmod(position, len(self.items))
        item = self.items[_order(self.recipe.seed, epoch, len(self.items))[place]]
        recipe = self.recipe
        try:
            values_HWC, indexes_HW = patiently(lambda: self.loader.load(item, self._reads))
        except ImageRejected as error:
            blank = np.zeros((*recipe.augment.size, self.about.channels), np.uint8)
            size = recipe.augment.size if self.longest is None else ()
            void = np.full(size, recipe.ignore_id, self.loader.ontology.dtype)
            return blank, void, (item.key, error.station, error.reason, error.detail)
        draws = drawing(recipe.seed, VIEW, position)
        labels_HW = self._table[indexes_HW]
        if self._reads is None:
            pixels_HWC = as_read(values_HWC, self.about)
            return *recipe.augment(pixels_HWC, labels_HW, draws, recipe.ignore_id), None
        pixels_HWC = as_read(values_HWC, self.about)
        nothing_HW = np.zeros(pixels_HWC.shape[:2], np.uint8)
        pixels_hwC, _ = recipe.augment(pixels_HWC, nothing_HW, draws, recipe.ignore_id)
        return pixels_hwC, labels_HW[0, 0], None

    @property
    def _reads(self) -> Reads | None:
        """At which size a classifier reads a picture."""
        if self.longest is None:
            return None
        return partial(size_read, resize=self.about.resize, longest=self.longest)

    @property
    def _table(self) -> Array:
        """From the ontology's indexes to places among the scores."""
        return _table(self.place, self.loader.ontology.ignored, self.recipe.ignore_id)


def as_read(values_HWC: Array, about: InputInfo) -> Array:
    """8-bit pixels with the model's channels: 16 bits by its range, as inference reads them."""
    if values_HWC.dtype == np.uint16:
        lo, hi = about.range or (0, 65_535)
        values_HWC = (np.clip((values_HWC - np.float32(lo)) / (hi - lo), 0, 1) * 255).round()
        values_HWC = values_HWC.astype(np.uint8)
    channels = values_HWC.shape[2]
    if about.channels == channels:
        return values_HWC
    if about.channels == 3:
        return np.repeat(values_HWC, 3, axis=2)
    return (values_HWC @ np.array(LUMA, np.float32)).round().astype(np.uint8)[:, :, None]


@lru_cache(maxsize=4)  # parts of two epochs meet where one ends
def _order(seed: int, epoch: int, pictures: int) -> Array:
    return drawing(seed, ORDER, epoch).permutation(pictures)


@lru_cache(maxsize=4)
def _table(place: tuple[int, ...], ignored: int, void: int) -> Array:
    table = np.full(ignored + 1, void, np.uint8 if max(void, len(place)) < 256 else np.uint16)
    table[: len(place)] = place
    return table
