"""The card of a trained model: `model.json`, strict in both directions.

A bundle is a folder of `weights.safetensors` and `model.json`. The card names everything needed to
use the weights, and holds their hash; the hash of the card is therefore the hash of the bundle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from models.parts.configs import Json, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT_VERSION = 1
CARD = "model.json"
WEIGHTS = "weights.safetensors"
RUNS_CODE = frozenset(
    {".pt", ".pth", ".pt2", ".pkl", ".pickle", ".bin", ".ckpt", ".ts", ".torchscript"}
)
"""Endings of files that run code when they are opened."""
Task = Literal["segment", "classify"]


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """One thing the model can tell apart."""

    id: int
    """Its value in a mask, 0 to 65534 (beyond 254 masks are 16-bit); not always its place among the
    scores."""
    name: str
    color: tuple[int, int, int]
    """Red, green, blue, each 0 to 255."""

    def __post_init__(self) -> None:
        if not 0 <= self.id <= 65_534:
            raise ValueError(f"class {self.name!r} has id {self.id}; masks hold 0 to 65534")
        if len(self.color) != 3 or not all(0 <= part <= 255 for part in self.color):
            raise ValueError(f"class {self.name!r}: color {self.color} is not three of 0 to 255")


@dataclass(frozen=True, slots=True)
class InputInfo:
    """How pixels become the numbers that the model reads: ((v - lo) / (hi - lo) - mean) / std."""

    channels: int
    """1 (gray) or 3 (RGB)."""
    mean: tuple[float, ...]
    """Per channel, on the scale where black is 0 and white is 1."""
    std: tuple[float, ...]
    range: tuple[float, float] | None = None
    """The 16-bit pixel values that become 0 and 1; None: 0 and 65535. 8-bit ones are 0 to 255."""
    resize: tuple[int, int] | None = None
    """Height and width that a picture is stretched to before the model reads it; classifiers only.
    None: a classifier reads pictures as they are, scaled down where they exceed the tile."""

    def __post_init__(self) -> None:
        for name in ("mean", "std", "range"):  # 0 and 0.0 are equal, their JSON and its hash not
            numbers = getattr(self, name)
            object.__setattr__(self, name, numbers and tuple(float(part) for part in numbers))
        if self.channels not in (1, 3):
            raise ValueError(f"input.channels must be 1 or 3, it is {self.channels}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"input.mean {self.mean} and input.std {self.std} must hold {self.channels} numbers"
            )
        if min(self.std) <= 0:
            raise ValueError(f"input.std must be above 0, it is {self.std}")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"input.range must rise, it is {self.range}")
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
            raise ValueError(
                f"input.resize must be height and width, 1 or more each, it is {self.resize}"
            )


@dataclass(frozen=True, slots=True)
class TileInfo:
    """The tile the model was made for, in pixels."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"tile.overlap {self.overlap} must be below tile.size {self.size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Everything about a model but its weights."""

    architecture: str
    """A file of models/."""
    config: dict[str, Json]
    """Its `Config`, in full."""
    classes: tuple[ClassInfo, ...]
    """In the order of the scores."""
    input: InputInfo
    stride: int
    """Input pixels per cell of the native grid."""
    receptive_field: int | None
    """Pixels one answer depends on; None: all of them."""
    tile: TileInfo | None = None
    task: Task = "segment"
    """What is answered: a class for every pixel, or one for the whole picture."""
    ignore_id: int = 255
    """The label that was left out of training, and that a mask holds where there is no answer."""
    provenance: dict[str, Json]
    """Script, data and its hash, seed, date, licence."""
    metrics: dict[str, Json]
    """What was measured before it was shipped."""
    weights_sha256: str = ""
    """Filled in by `save_bundle`."""

    def __post_init__(self) -> None:
        ids = [entry.id for entry in self.classes]
        if len(ids) < 2 or len(set(ids)) < len(ids) or self.ignore_id in ids:
            raise ValueError(
                f"classes need two or more different ids other than ignore_id {self.ignore_id}, "
                f"they are {ids}"
            )
        if not 0 <= self.ignore_id <= 65_535:
            raise ValueError(f"ignore_id must be 0 to 65535, it is {self.ignore_id}")
        if self.task not in get_args(Task):
            tasks = get_args(Task)
            raise ValueError(f"there is no task {self.task!r}{did_you_mean(self.task, tasks)}")
        if self.input.resize is not None and self.task != "classify":
            raise ValueError(
                f"input.resize {self.input.resize} is for classifiers, this task is {self.task}; "
                "leave it out: pictures are cut into tiles instead"
            )

    @property
    def sha256(self) -> str:
        """The name of the bundle: a hash of its card, and through it of its weights."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """The canonical bytes of `model.json`."""
        card = {"format_version": FORMAT_VERSION, **asdict(self)}
        # What only classifiers have is left out of other cards: older ones keep bytes and hash.
        if self.task == "segment":
            del card["task"]
        if self.input.resize is None:
            del card["input"]["resize"]
        text = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()

    @classmethod
    def from_json(cls, data: bytes) -> Bundle:
        """Read a card.

        Raises:
            ValueError: it is not one, or not one that this version can use without guessing.
        """
        try:
            card = json.loads(data, parse_constant=_no_constant)
        except (UnicodeDecodeError, json.JSONDecodeError) as problem:
            raise ValueError(f"{CARD} is not JSON: {problem}") from problem
        version = _the(dict, card, "the card").pop("format_version", None)
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(
                f"{CARD} has format_version {version!r}, this version reads {FORMAT_VERSION}; "
                "update maskfleet or save the bundle again"
            )
        return _bundle(_only_known(cls, card, CARD))


def _bundle(card: dict[str, Any]) -> Bundle:
    """The record of a card whose keys are known; what it holds is checked here."""
    classes = _the(list, card["classes"], "classes")
    checked: dict[str, Any] = {
        "architecture": _the(str, card["architecture"], "architecture"),
        "config": _the(dict, card["config"], "config"),
        "classes": tuple(_class(entry, f"classes[{i}]") for i, entry in enumerate(classes)),
        "input": _input(card["input"]),
        "stride": _the(int, card["stride"], "stride"),
        "provenance": _the(dict, card["provenance"], "provenance"),
        "metrics": _the(dict, card["metrics"], "metrics"),
        "receptive_field": None,
    }
    if card["receptive_field"] is not None:
        checked["receptive_field"] = _the(int, card["receptive_field"], "receptive_field")
    if card.get("tile") is not None:
        tile = _only_known(TileInfo, card["tile"], "tile")
        checked["tile"] = TileInfo(**{key: _the(int, tile[key], f"tile.{key}") for key in tile})
    for key, kind in (("task", str), ("ignore_id", int), ("weights_sha256", str)):
        if key in card:
            checked[key] = _the(kind, card[key], key)
    return Bundle(**checked)


def _class(entry: object, where: str) -> ClassInfo:
    known = _only_known(ClassInfo, entry, where)
    return ClassInfo(
        id=_the(int, known["id"], f"{where}.id"),
        name=_the(str, known["name"], f"{where}.name"),
        color=tuple(_numbers(int, known["color"], f"{where}.color", count=3)),
    )


def _input(entry: object) -> InputInfo:
    known = _only_known(InputInfo, entry, "input")
    channels = _the(int, known["channels"], "input.channels")
    limits, resize = known.get("range"), known.get("resize")
    return InputInfo(
        channels=channels,
        mean=tuple(_numbers(float, known["mean"], "input.mean", count=channels)),
        std=tuple(_numbers(float, known["std"], "input.std", count=channels)),
        range=None if limits is None else tuple(_numbers(float, limits, "input.range", count=2)),
        resize=None if resize is None else tuple(_numbers(int, resize, "input.resize", count=2)),
    )


def _only_known(cls: type, entry: Any, where: str) -> dict[str, Any]:  # noqa: ANN401  (raw JSON)
    """The entry, if it has the keys of the record, all that are needed and no other."""
    known = {field.name: field for field in fields(cls)}
    for key in _the(dict, entry, where):
        if key not in known:
            raise ValueError(f"{CARD}: {where} has no key {key!r}{did_you_mean(key, known)}")
    for key, field in known.items():
        if key not in entry and field.default is MISSING:
            raise ValueError(f"{CARD}: {where} lacks {key!r}; save the bundle again")
    return entry


def _numbers(kind: type, value: object, where: str, *, count: int) -> Iterable[Any]:
    items = _the(list, value, where)
    if len(items) != count:
        raise ValueError(f"{CARD}: {where} must hold {count} numbers, it is {items!r}")
    return [_the(kind, item, where) for item in items]


def _the(kind: type, value: object, where: str) -> Any:  # noqa: ANN401  (of the kind asked for)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{CARD}: {where} must be of type {kind.__name__}, it is {value!r}"[:200])
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{CARD} holds {name}, which is no JSON number")
