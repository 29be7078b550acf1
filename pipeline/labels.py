"""Labelled pictures: what there is, whether it can be used, and how it is read. Start here.

`open_labelled` finds pictures and masks (pipeline/pairing.py), their split and stratum, and what
the masks' values mean (pipeline/ontology.py); then it reads everything once and refuses what would
fail later. A `Loader` reads them again wherever they are needed: it is three places and a rule.
docs/labels.md says it all for people.

Shapes: H, W of the upright picture; C channels.
"""

import hashlib
import io
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Literal, TypeVar, cast

import numpy as np
from PIL import Image

from pipeline import formats
from pipeline.config import Fragments
from pipeline.decode import DecodeLimits, Reads, decode
from pipeline.errors import ImageRejected, Reason, RunRefused
from pipeline.fetching import believed
from pipeline.formats import parquet
from pipeline.headers import probe, sniff
from pipeline.keys import path_of, printable
from pipeline.ontology import NAME as ONTOLOGY
from pipeline.ontology import Ontology, read_ontology
from pipeline.pairing import Pile, Problems, paired, pile_of
from pipeline.records import Array, EncodedImage, PlannedImage, Verdict
from pipeline.scaling import scaled
from pipeline.splits import DATASET, beside, given_file, splits_of, strata_rule
from pipeline.storage import Store, open_store

THREADS = 8  # fragments of labelled pictures that are checked at the same time
SMALLEST, PARTS = 16, 64  # a fragment holds clamp(N / 64, 16, fragment.images) pictures, as a run's

Task = Literal["segment", "classify"]
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class LabelledItem:
    """A picture and where its mask lies, or which class it has."""

    key: str
    """The key a run over the same pictures gives it, or the table's own."""
    image: PlannedImage
    mask: PlannedImage | None
    """None: the whole picture has a class."""
    split: str | None
    """None: in no split, though others are."""
    stratum: str | None
    label: str = ""
    """The class of the whole picture; empty where it has a mask."""


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Loader:
    """Reads labelled pictures, on any machine and in any thread; holds no secrets and no files."""

    images: str
    """The store of the pictures."""
    masks: str
    ontology: Ontology
    limits: DecodeLimits = field(default_factory=DecodeLimits)

    def load(self, item: LabelledItem, reads: Reads | None = None) -> tuple[Array, Array]:
        """A picture and its labels.

        Args:
            item: which one.
            reads: the size at which a classifier reads it: it comes scaled to that, as in a run.

        Returns:
            pixels_HWC, uint8 or uint16, upright; labels_HW, class indexes in the ontology's order,
            the largest value (255, or 65535) where there is nothing to learn: pixels of the ignored
            id, and those where the picture holds no data. A label of the whole picture is one
            pixel, 1 x 1.

        Raises:
            ImageRejected: the picture cannot be read.
            RunRefused: the mask cannot, or does not fit.
        """
        if item.image.problem:
            reason, _, detail = item.image.problem.partition(": ")
            raise ImageRejected("plan", cast("Reason", reason), detail)
        (image,) = self.encoded([item], 1)
        if image.data is None:
            verdict = image.verdict or Verdict("fetch", "unreadable", "no bytes came")
            raise ImageRejected(verdict.station, verdict.reason, verdict.detail)
        pixels = decode(image.data, self.limits, reads)
        (mask,) = self.encoded_masks([item], 1)
        labels_HW = self.labels(item, mask, (pixels.height, pixels.width))
        if pixels.nodata_HW is not None and item.mask is not None:
            labels_HW[pixels.nodata_HW] = self.ontology.ignored
        if reads is not None:
            upright = pixels.whole or (pixels.height, pixels.width)
            return scaled(pixels.values_HWC, reads(upright)), labels_HW
        return pixels.values_HWC, labels_HW

    def encoded(self, items: Sequence[LabelledItem], threads: int) -> Iterator[EncodedImage]:
        """Encoded pictures, in order; consecutive ones of one shard are read together."""
        yield from self._fetched(self.images, [item.image for item in items], threads, masks=False)

    def encoded_masks(self, items: Sequence[LabelledItem], threads: int) -> Iterator[EncodedImage]:
        """Encoded masks, in order; of a whole picture's class, its name."""
        masks = [item.mask for item in items if item.mask is not None]
        found = self._fetched(self.masks, masks, threads, masks=True)
        for item in items:
            named = EncodedImage(item.image, item.label.encode("utf-8", "surrogateescape"))
            yield named if item.mask is None else next(found)

    def _fetched(
        self, uri: str, wanted: list[PlannedImage], threads: int, *, masks: bool
    ) -> Iterator[EncodedImage]:
        store = open_store(uri)
        yield from believed(store, self._answers(store, wanted, threads, masks=masks))

    def _answers(
        self, store: Store, wanted: list[PlannedImage], threads: int, *, masks: bool
    ) -> Iterator[EncodedImage]:
        limit = self.limits.max_bytes
        for name, group in groupby(wanted, key=lambda image: image.format):
            if name == "parquet":
                yield from _rows(store, list(group), limit, masks=masks)
            else:
                yield from formats.load(name).fetch(store, list(group), threads, limit)

    def labels(self, item: LabelledItem, mask: EncodedImage, size: tuple[int, int]) -> Array:
        """Class indexes of a mask; 1 x 1 of a whole picture's class.

        Args:
            item: whose it is.
            mask: its bytes.
            size: height and width of the upright picture.

        Raises:
            RunRefused: if it is none, or does not fit.
        """
        if item.mask is None:
            return np.array([[self.ontology.names.index(item.label)]], self.ontology.dtype)
        try:
            values_HW = read_mask(mask)
            labels_HW = self.ontology.indexes(values_HW)
        except ValueError as error:
            raise RunRefused(f"the mask of {printable(item.key)}: {error}") from error
        if labels_HW.shape != size:
            raise RunRefused(
                f"the mask of {printable(item.key)} is {_shown(labels_HW.shape)}, "
                f"the picture {_shown(size)}"
            )
        return labels_HW


def _rows(
    store: Store, wanted: list[PlannedImage], limit: int, *, masks: bool
) -> Iterator[EncodedImage]:
    """Rows in any order; each table is read forwards."""
    forward = sorted(wanted, key=lambda image: (path_of(image.key), int(image.member or 0)))
    fetched = parquet.fetch_masks if masks else partial(parquet.fetch, threads=1)
    found = {one.plan.key: one for one in fetched(store, forward, limit=limit)}
    yield from (found[image.key] for image in wanted)


def read_mask(mask: EncodedImage) -> Array:
    """The values of a class-index PNG as they are stored: gray of 1 to 16 bits, or palette places.

    Raises:
        ValueError: if it is something else.
    """
    if mask.plan.problem or mask.data is None:
        said = mask.plan.problem or (mask.verdict.detail if mask.verdict else "no bytes came")
        raise ValueError(said)
    if sniff(mask.data[:262]) != "PNG":
        raise ValueError("is no PNG; a mask holds class ids and must not lose any")
    try:
        with Image.open(io.BytesIO(mask.data), formats=["PNG"]) as image:
            stored = str(image.tile[0].args) if image.tile else ""
            if image.mode not in {"1", "L", "P", "I;16"}:
                raise ValueError(f"is {image.mode}; a mask holds one class id a pixel")
            values_HW = np.asarray(image)
    except (OSError, SyntaxError, MemoryError) as error:
        raise ValueError(f"cannot be read: {printable(str(error))}") from error
    if values_HW.dtype == bool:
        return values_HW.astype(np.uint8)
    # Pillow stretches gray of 2 and 4 bits to 0..255; places of a palette it leaves alone.
    return values_HW // {"L;2": 85, "L;4": 17}.get(stored, 1) if image.mode == "L" else values_HW


def _shown(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"


# ---------------------------------------------------------------------------------------- the set


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """Labelled pictures, in the order in which they lie."""

    items: tuple[LabelledItem, ...]
    ontology: Ontology
    loader: Loader
    name: str
    """What was opened, for people."""
    lines: Mapping[str, str] = field(default_factory=dict)
    """By key, what the set's hash is made of; empty: not checked yet."""

    @property
    def sha256(self) -> str | None:
        """Of keys, bytes of pictures and masks, and splits (`check`); None: not checked yet."""
        if not self.lines:
            return None
        text = "".join(self.lines[key] for key in sorted(item.key for item in self.items))
        return _digest(text.encode("utf-8", "surrogateescape"))

    def load(self, item: LabelledItem) -> tuple[Array, Array]:
        """See `Loader.load`."""
        return self.loader.load(item)

    @property
    def splits(self) -> dict[str, int]:
        """Pictures of each split, by its name."""
        counts = Counter(item.split for item in self.items if item.split is not None)
        return dict(sorted(counts.items()))

    def only(self, split: str) -> "LabelledSet":
        """The pictures of a split: a set of its own.

        Raises:
            RunRefused: if there is no such split.
        """
        if split not in self.splits:
            there = ", ".join(f"{name} ({count})" for name, count in self.splits.items())
            raise RunRefused(f"{self.name} has no split {split!r}; it has: {there}")
        return self.among(item for item in self.items if item.split == split)

    @property
    def task(self) -> Task:
        """What a model that learns from it does: ``segment``; ``classify`` whole pictures."""
        return "classify" if any(item.mask is None for item in self.items) else "segment"

    def among(self, items: Iterable[LabelledItem]) -> "LabelledSet":
        """Some of the pictures: a set of its own, checked if this one is."""
        return replace(self, items=tuple(items))


def open_labelled(
    data: str,
    *,
    ontology: str | None = None,
    splits: str | None = None,
    strata: str | None = None,
    checked: bool = True,
) -> LabelledSet:
    """Labelled pictures at a place; nothing is kept open.

    Args:
        data: a folder or s3:// prefix with images/ and masks/, or with shards that have masks; or
            ``run://RUN?masks=FOLDER``.
        ontology: a JSON file with classes; default: what lies beside the data.
        splits: a JSON file of split names and the keys in them; default: what lies beside the data.
        strata: a JSON file of patterns and stratum names; default: what lies beside the data.
        checked: read everything once (`check`); else only listings are looked at.

    Raises:
        RunRefused: naming what is wrong with it.
    """
    pile = pile_of(data)
    pairs = paired(pile, data)
    known = _ontology(pile, ontology, data)
    labels = _labels(pile, known, data)
    split_of = splits_of([image for image, _ in pairs], pile.about, splits, data)
    stratum_of = strata_rule(pile.about, strata)
    items = tuple(
        LabelledItem(
            image.key,
            image.plan,
            None if mask is None else mask.plan,
            split_of.get(image.key),
            image.stratum or stratum_of(image.key),
            labels.get(image.key, ""),
        )
        for image, mask in pairs
    )
    found = LabelledSet(items, known, Loader(pile.images_uri, pile.masks_uri, known), data)
    return check(found) if checked else found


def _labels(pile: Pile, known: Ontology, data: str) -> dict[str, str]:
    """The name of the class of each whole picture; nothing where there are masks."""
    if pile.masks is not None:
        return {}
    problems, found = Problems(), dict[str, str]()
    for piece in pile.images:
        name = known.meant(piece.label or "")
        if name is None:
            problems.add("labels that are no class", f"{piece.label} of {piece.key}")
        else:
            found[piece.key] = name
    problems.refuse(data, f" (there are {known.shown()})")
    return found


def _ontology(pile: Pile, given: str | None, data: str) -> Ontology:
    if given is not None:
        found = read_ontology(*given_file(given))
        if found is None:
            raise RunRefused(f"--ontology {given} names no classes")
        return found
    for name in (ONTOLOGY, DATASET):
        text = beside(pile.about, name)
        found = None if text is None else read_ontology(text, f"{pile.about.uri}/{name}")
        if found is not None:
            return found
    if pile.ontology is None:
        raise RunRefused(
            f"nothing says what the {'labels' if pile.masks is None else 'masks'} of {data} mean: "
            f"put {ONTOLOGY} there or give --ontology, "
            '{"classes": [{"id": 0, "name": "road", "color": [128, 64, 128]}, ...]}'
        )
    return pile.ontology


def refuse_other_task(model: str, task: Task, labelled: LabelledSet) -> None:
    """Refuse a model that answers whole pictures where masks say what is true, or masks otherwise.

    Raises:
        RunRefused: naming both.
    """
    if task == labelled.task:
        return
    if task == "classify":
        raise RunRefused(
            f"{model} is a classifier, and {labelled.name} has masks; a classifier needs one label "
            "a picture: labels.csv, a column `label`, or folders named as classes"
        )
    raise RunRefused(
        f"{model} makes masks, and {labelled.name} has none: its labels are of whole pictures "
        f"({labelled.ontology.shown()})"
    )


def hashed_share(key: str, share: float, salt: str) -> bool:
    """Whether a key belongs to a fixed share of all keys there will ever be.

    The SHA-256 of salt and key decides, so what is in an evaluation set stays in it, whatever is
    labelled later, and any batch of labels gives about this share of itself.
    """
    digest = hashlib.sha256(f"{salt}\n{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# --------------------------------------------------------------------------------------- the check


@dataclass(frozen=True, slots=True)
class _Seen:
    """What reading a picture and its mask has shown."""

    key: str
    line: str
    """Of the set's hash."""
    trouble: tuple[str, str] | None


def check(labelled: LabelledSet, threads: int = THREADS) -> LabelledSet:
    """Read every picture and mask once: the same set with its hash.

    The hash is the SHA-256 of one line per picture, in order of the keys: key, SHA-256 of the
    picture's bytes (empty where they cannot be had), SHA-256 of the mask's, split; so it is the
    same wherever the bytes lie. Pictures are hashed, not decoded: those that are broken are met,
    and rejected, where they are used.

    Raises:
        RunRefused: naming masks that are none, hold what is no class, or are of another size than
            their upright picture.
    """
    problems, lines = Problems(), dict[str, str]()
    parts = fragments(labelled.items)
    for seen in in_order(lambda items: _look(labelled.loader, items), parts, threads):
        for one in seen:
            lines[one.key] = one.line
            if one.trouble is not None:
                problems.add(*one.trouble)
    problems.refuse(labelled.name, f" (masks hold {labelled.ontology.shown()})")
    return replace(labelled, lines=lines)


def _look(loader: Loader, items: Sequence[LabelledItem]) -> list[_Seen]:
    both = zip(items, loader.encoded(items, 1), loader.encoded_masks(items, 1), strict=True)
    return [_seen(loader, *one) for one in both]


def _seen(loader: Loader, item: LabelledItem, image: EncodedImage, mask: EncodedImage) -> _Seen:
    parts = item.key, _digest(image.data), _digest(mask.data), item.split or ""
    line = "".join(f"{part}\n" for part in parts)
    return _Seen(item.key, line, _trouble(loader, item, image, mask))


def _digest(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def _trouble(
    loader: Loader, item: LabelledItem, image: EncodedImage, mask: EncodedImage
) -> tuple[str, str] | None:
    name, values_HW = mask.plan.key, None
    if item.mask is not None:
        try:
            values_HW = read_mask(mask)
        except ValueError as error:
            return "masks that cannot be used", f"{name} {error}"
        try:
            loader.ontology.indexes(values_HW)
        except ValueError as error:
            return "masks with values that are no class", f"{name} {error}"
    if image.data is None:
        if image.verdict is not None and image.verdict.reason == "too_large":
            return None  # rejected where it is used, as any picture beyond the limits
        reason = image.verdict.detail if image.verdict else "no bytes came"
        return "pictures that cannot be fetched", f"{image.plan.key} ({reason})"
    if values_HW is None:
        return None
    size = _upright_size(image.data, values_HW.shape, loader.limits)
    if size is not None and size != values_HW.shape:
        said = f"{name} is {_shown(values_HW.shape)}, its picture {_shown(size)}"
        return "masks of another size than their picture", said
    return None


def _upright_size(
    data: bytes, expected: tuple[int, ...], limits: DecodeLimits
) -> tuple[int, int] | None:
    """Height and width of a picture once it is upright; None where it cannot be decoded.

    The header is believed where it says what is expected, unless an orientation may lie where it
    does not look; else the picture is decoded.
    """
    turned = sniff(data[:262]) in {"PNG", "WEBP"} and (
        b"eXIf" in data or b"EXIF" in data or b"profile type exif" in data
    )
    if not turned and probe(data) == expected:
        return probe(data)
    try:
        pixels = decode(data, limits)
    except ImageRejected:
        return None
    return pixels.height, pixels.width


def fragments(
    items: Sequence[LabelledItem], rule: Fragments | None = None
) -> Iterator[list[LabelledItem]]:
    """Consecutive pictures, bounded in number and bytes by the rule of a run's fragments."""
    rule = rule or Fragments()
    most = min(rule.images, max(SMALLEST, len(items) // PARTS))
    part: list[LabelledItem] = []
    nbytes = 0
    for item in items:
        size = item.image.nbytes
        if part and (len(part) >= most or nbytes + size > rule.bytes):
            yield part
            part, nbytes = [], 0
        part.append(item)
        nbytes += size
    if part:
        yield part


def in_order(work: Callable[[In], Out], parts: Iterable[In], threads: int) -> Iterator[Out]:
    """Each part worked on in threads; answers in order, few of them waiting."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Out]] = deque()
        for part in parts:
            waiting.append(pool.submit(work, part))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
