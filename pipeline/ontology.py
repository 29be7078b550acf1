"""What the values of a mask mean: class ids with names and colours, and the id that is left out.

Two forms of JSON are read. Our own, which a bundle's ``model.json`` has too:

    {"classes": [{"id": 0, "name": "road", "color": [128, 64, 128]}, ...], "ignore_id": 255}

and that of many data sets: names, with ids and colours beside them (else their places, else made
up). A class whose id is the ``void_id`` is no class:

    {"classes": ["road", "void"], "class_ids": {"road": 0, "void": 11}, "void_id": 11,
     "palette": [[128, 64, 128], [0, 0, 0]]}
"""

import colorsys
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from models import ClassInfo
from pipeline.errors import RunRefused
from pipeline.records import Array

NAME = "ontology.json"
VALUES = 65_536  # a mask has 8 or 16 bits
GOLDEN = 0.618  # steps of this share of the colour wheel keep neighbours far apart


@dataclass(frozen=True, slots=True)
class Ontology:
    """Classes in the order of the labels' indexes."""

    classes: tuple[ClassInfo, ...]
    ignore_id: int
    """Value of the mask's pixels that nobody is to learn or answer for."""

    @property
    def dtype(self) -> np.dtype:
        """Of class indexes, the largest of which means ignored."""
        return np.dtype(np.uint8 if len(self.classes) < 255 else np.uint16)

    @property
    def ignored(self) -> int:
        """The index of ignored pixels: 255, or 65535 beyond 254 classes."""
        return int(np.iinfo(self.dtype).max)

    @property
    def names(self) -> list[str]:
        """Of the classes, in order."""
        return [entry.name for entry in self.classes]

    @property
    def sha256(self) -> str:
        """Of everything that is said here."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def indexes(self, values_HW: Array) -> Array:
        """Class indexes of a mask's values.

        Args:
            values_HW: ids, uint8 or uint16.

        Raises:
            ValueError: it holds other ids, naming them.
        """
        known, index = np.zeros(VALUES, bool), np.zeros(VALUES, self.dtype)
        for place, entry in enumerate(self.classes):
            known[entry.id], index[entry.id] = True, place
        known[self.ignore_id], index[self.ignore_id] = True, self.ignored
        if not known[values_HW].all():
            strange = np.unique(values_HW[~known[values_HW]]).tolist()
            shown = ", ".join(map(str, strange[:10])) + (", …" if len(strange) > 10 else "")
            raise ValueError(f"holds {shown}")
        return index[values_HW]

    def meant(self, label: str) -> str | None:
        """The name of the class that a name or an id means; None: there is none."""
        if label in self.names:
            return label
        return next((entry.name for entry in self.classes if str(entry.id) == label), None)

    def shown(self) -> str:
        """The values a mask may hold, in words."""
        some = ", ".join(f"{entry.id} {entry.name}" for entry in self.classes[:20])
        more = f", … ({len(self.classes)} classes)" if len(self.classes) > 20 else ""
        return f"{some}{more}; ignored: {self.ignore_id}"


def read_ontology(data: bytes, where: str) -> Ontology | None:
    """The ontology that a JSON file holds, in one of the two forms; None if it names no classes.

    Args:
        data: the file.
        where: its name, for what is refused.

    Raises:
        RunRefused: if it is no JSON, or says what cannot be.
    """
    try:
        card = json.loads(data)
    except ValueError as error:
        raise RunRefused(f"{where} is not JSON: {error}") from error
    if not isinstance(card, dict) or "classes" not in card:
        return None
    try:
        return _checked(card)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise RunRefused(
            f"{where}: {said}; an ontology is "
            '{"classes": [{"id": 0, "name": "road", "color": [128, 64, 128]}, ...], '
            '"ignore_id": 255}'
        ) from error


def _checked(card: dict[str, Any]) -> Ontology:
    entries = card["classes"]
    if not isinstance(entries, list) or not entries:
        raise ValueError("classes must be a list that is not empty")
    named = all(isinstance(entry, str) for entry in entries)
    classes = _named(card) if named else [_class(entry, i) for i, entry in enumerate(entries)]
    ignore_id = card.get("void_id") if named else card.get("ignore_id")
    if ignore_id is None:
        ignore_id = 255 if max(entry.id for entry in classes) < 255 else 65_535
    return _side_by_side(classes, ignore_id)


def _side_by_side(classes: list[ClassInfo], ignore_id: int) -> Ontology:
    for what, values in (("id", [c.id for c in classes]), ("name", [c.name for c in classes])):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ValueError(f"two classes have the {what} {twice[0]!r}")
    if type(ignore_id) is not int or not 0 <= ignore_id < VALUES:
        raise ValueError(f"the ignored id must be 0 to {VALUES - 1}, it is {ignore_id!r}")
    if ignore_id in [entry.id for entry in classes]:
        raise ValueError(f"{ignore_id} is ignored and cannot be a class as well")
    if len(classes) < 2:
        raise ValueError("there must be two classes or more")
    return Ontology(tuple(classes), ignore_id)


def _class(entry: dict[str, Any], place: int) -> ClassInfo:
    color = tuple(entry.get("color") or _colour(place))
    return _info(entry["id"], entry["name"], color)


def _named(card: dict[str, Any]) -> list[ClassInfo]:
    names = card["classes"]
    ids = card.get("class_ids") or {name: place for place, name in enumerate(names)}
    palette = card.get("palette") or [_colour(place) for place in range(len(names))]
    if len(palette) != len(names):
        raise ValueError(f"palette has {len(palette)} colours for {len(names)} classes")
    void = card.get("void_id")
    return [
        _info(ids[name], name, tuple(color))
        for name, color in zip(names, palette, strict=True)
        if ids[name] != void
    ]


def _info(number: object, name: object, color: tuple[Any, ...]) -> ClassInfo:
    if type(number) is not int or not isinstance(name, str) or not name:
        raise ValueError(f"class {name!r} has id {number!r}: a name and a whole number are needed")
    if len(color) != 3 or not all(type(part) is int for part in color):
        raise ValueError(f"class {name!r}: color {list(color)} is not three of 0 to 255")
    return ClassInfo(number, name, color)


def _colour(place: int) -> tuple[int, int, int]:
    """Where a data set gives none: all different to the eye."""
    red, green, blue = colorsys.hsv_to_rgb(place * GOLDEN % 1, 0.75, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)
