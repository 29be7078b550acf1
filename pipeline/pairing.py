"""Where labelled pictures lie: three ways, and how a picture finds its mask or its class.

folder   ``images/`` and ``masks/``: the same path but for the suffix
shards   tar members ``NAME.jpg`` and ``NAME.mask.png`` (or ``NAME.seg.png``) of one shard (loose
         files side by side, too); Parquet rows with a column ``mask``, and maybe ``key``, ``split``
         and ``stratum``
run      a finished run, and a folder of corrected masks ``KEY.png`` laid over it; a ``/`` of the
         key is a folder or written ``%2F``, which no key holds

Where there are no masks at all, whole pictures may have a class (pipeline/whole_labels.py).

Nothing is opened here but listings, headers of shards, and columns of text.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pipeline.config import SegmentConfig
from pipeline.errors import RunRefused, StorageMissing
from pipeline.formats import Entry, parquet, webdataset
from pipeline.keys import escape, path_of, printable
from pipeline.kinds import OURS, kind_of_name, picture_of_mask
from pipeline.listing import Listing, discover, key_of
from pipeline.ontology import Ontology, read_ontology
from pipeline.reader import Run, open_run
from pipeline.records import PlannedImage
from pipeline.storage import Found, Store, open_store
from pipeline.whole_labels import TABLE, Row, by_folder, table_of

RUN = "run://"
MASKS_OF_RUN = "?masks="
NOTES = ("key", "split", "stratum", "label")
LABELS_AT_ONCE, LABEL_BYTES = 16, 4096  # requests for labels; of one of them
SHOWN = 10
"""Offenders that a refusal names."""
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A picture or a mask, before they are paired."""

    name: str
    """What a picture and its mask have in common."""
    plan: PlannedImage
    key: str
    split: str | None = None
    stratum: str | None = None
    label: str | None = None
    """Name or id of the whole picture's class; None: a mask says more, or nobody knows."""


@dataclass(frozen=True, slots=True)
class Pile:
    """What one source holds."""

    images_uri: str
    masks_uri: str
    about: Store
    """Where ontology.json, split lists and strata.json may lie."""
    images: list[Piece]
    masks: list[Piece] | None
    """None: the pictures have a label each instead."""
    ontology: Ontology | None = None
    """Where the source itself says it."""


def pile_of(data: str) -> Pile:
    """Pictures and masks of a source, unpaired.

    Raises:
        RunRefused: if there is nothing of the kind.
    """
    if data.startswith(RUN):
        return _of_run(data)
    store = open_store(data)
    images, masks = (open_store(f"{store.uri}/{name}") for name in ("images", "masks"))
    there = [_holds_anything(images), _holds_anything(masks)]
    if all(there):
        return _of_folders(store, images, masks)
    found = _of_shards(store) if there != [False, True] else None
    if found is not None:
        return found
    if any(there):
        has, lacks = ("images", "masks") if there[0] else ("masks", "images")
        raise RunRefused(f"{store.uri} has {has}/ and no {lacks}/; labelled data needs both")
    raise RunRefused(
        f"there are no labelled pictures below {store.uri}: no images/ and masks/, no "
        "NAME.mask.png beside NAME.jpg in a tar, no table with a column `mask`; for a classifier, "
        f"no {TABLE}, no table with a column `label`, no folders named as classes"
    )


def _holds_anything(store: Store) -> bool:
    try:
        return next(iter(store.list()), None) is not None
    except StorageMissing:
        return False


# ------------------------------------------------------------------------------------- folder pair


def _of_folders(store: Store, images: Store, masks: Store) -> Pile:
    """Every picture below images/, every PNG below masks/."""
    numbered = (_planned(images, place, *one) for place, one in enumerate(_walk(images, "files")))
    pictures = [Piece(without_suffix(plan.key), plan, plan.key) for plan in numbered]
    found = [
        Piece(without_suffix(plan.key), plan, plan.key)
        for plan in _pngs(masks, "masks/ holds {}, which is no PNG; masks are class-index PNGs")
    ]
    return Pile(images.uri, masks.uri, store, pictures, found)


def _pngs(store: Store, complaint: str) -> Iterator[PlannedImage]:
    """Every PNG; sidecars are passed over, other pictures are refused."""
    for place, found in enumerate(store.list()):
        if not found.regular or kind_of_name(found.path) == "skip":
            continue
        if not found.path.lower().endswith(".png"):
            raise RunRefused(complaint.format(printable(found.path)))
        yield _planned(store, place, found, "files", Entry(None, None, found.nbytes))


def without_suffix(key: str) -> str:
    """A key less the ending that says which picture format it is."""
    stem, dot, ending = key.rpartition(".")
    return stem if dot and f".{ending.lower()}" in OURS and stem else key


def _walk(store: Store, wanted: str) -> Iterator[tuple[Found, str, Entry]]:
    config = SegmentConfig(source=store.uri, out=f"{store.uri}.out", format=wanted)
    yield from discover(store, config, Listing(), masks=True)


def _planned(store: Store, place: int, found: Found, name: str, entry: Entry) -> PlannedImage:
    uri = f"{store.uri}/{escape(found.path)}"
    where = entry.member, entry.offset, entry.nbytes
    return PlannedImage(
        place, key_of(found, entry), uri, *where, found.etag, name, 0, entry.problem
    )


# ------------------------------------------------------------------------------------------ shards


def _of_shards(store: Store) -> Pile | None:
    """Tar members and loose files by their endings, Parquet rows by their column; None: no labels.

    What has no masks may have classes instead.
    """
    images, masks, labels = [], [], []
    rows: dict[str, _Rows] = {}
    for place, (found, name, entry) in enumerate(_walk(store, "auto")):
        plan, split = _planned(store, place, found, name, entry), split_of_path(found.path)
        if name != "files" and entry.member is None:
            raise RunRefused(f"{printable(plan.uri)} is damaged: {plan.problem}")
        if name == "parquet":
            if found.path not in rows:
                rows[found.path] = _Rows.of(store, found)
            piece = rows[found.path].piece(plan, split)
            images.append(piece)
            if rows[found.path].masks:
                masks.append(piece)
            continue
        if entry.skipped:
            labels.append(plan)
            continue
        mask = picture_of_mask(plan.key)
        piece = Piece(mask or without_suffix(plan.key), plan, plan.key, split)
        (masks if mask else images).append(piece)
    if masks:
        return Pile(store.uri, store.uri, store, images, masks)
    return _of_whole_pictures(store, images, labels)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a table says of its rows beside picture and mask."""

    notes: dict[str, list[str | None]]
    masks: bool
    """Whether it has any."""

    @classmethod
    def of(cls, store: Store, found: Found) -> "_Rows":
        try:
            return cls(*parquet.notes(store, found, NOTES))
        except ValueError as error:
            raise RunRefused(f"{printable(found.path)}: {error}") from error

    def piece(self, plan: PlannedImage, split: str | None) -> Piece:
        row = int(plan.member or 0)
        said = (self.notes[n][row] if n in self.notes else None for n in NOTES)
        key, own_split, stratum, label = said
        if key is not None and not key.isprintable():
            raise RunRefused(f"{plan.key}: its key {key!r} is not printable")
        return Piece(plan.key, plan, key or plan.key, own_split or split, stratum, label or None)


def split_of_path(path: str) -> str | None:
    """The split that a folder or shard is named for: ``train/…``, ``val-0003.tar``."""
    for part in path.lower().split("/"):
        word = re.split("[^a-z0-9]", part, maxsplit=1)[0]
        if word in SPLITS:
            return SPLITS[word]
    return None


def _of_whole_pictures(
    store: Store, images: list[Piece], labels: list[PlannedImage]
) -> Pile | None:
    """Pictures with a class each, as labels.csv, a column, a member or their folders say it."""
    if (rows := table_of(store)) is not None:
        images = list(_by_table(store, images, rows))
    elif labels:
        images = _by_members(store, images, labels)
    elif not any(piece.label for piece in images):
        folders = by_folder((piece.key for piece in images), SPLITS)
        if folders is None:
            return None
        images = [replace(piece, label=folders[piece.key]) for piece in images]
    names = sorted({piece.label for piece in images if piece.label})
    numbers = all(name.isdecimal() for name in names)
    ontology = None
    if not numbers and len(names) > 1:
        ontology = read_ontology(json.dumps({"classes": names}).encode(), store.uri)
    return Pile(store.uri, store.uri, store, images, None, ontology)


def _by_members(store: Store, images: list[Piece], labels: list[PlannedImage]) -> list[Piece]:
    """Pictures of tars with what ``NAME.cls`` beside them says."""
    found: dict[str, str] = {}
    problems = Problems()
    for one in webdataset.fetch(store, labels, LABELS_AT_ONCE, LABEL_BYTES):
        try:
            found[one.plan.key.removesuffix(webdataset.LABEL)] = (one.data or b"").decode().strip()
        except UnicodeDecodeError:
            problems.add("labels that are no text", one.plan.key)
    problems.refuse(store.uri)
    return [replace(piece, label=found.get(piece.name) or piece.label) for piece in images]


def _by_table(store: Store, images: list[Piece], rows: dict[str, Row]) -> Iterator[Piece]:
    """Pictures as labels.csv has them; those with an empty label are left out."""
    problems, keys = Problems(), {piece.key for piece in images}
    for key in rows.keys() - keys:
        problems.add(f"keys in {TABLE} and nowhere else", key)
    for piece in images:
        if piece.key not in rows:
            problems.add(f"pictures that {TABLE} does not name", piece.key)
    problems.refuse(store.uri)
    for piece in images:
        said = {name: text or None for name, text in rows[piece.key].items()}
        if said["label"] is not None:
            yield replace(
                piece,
                label=said["label"],
                split=said.get("split") or piece.split,
                stratum=said.get("stratum") or piece.stratum,
            )


# --------------------------------------------------------------------------------------------- run


def _of_run(data: str) -> Pile:
    """The pictures of a run that have a corrected mask, and these masks."""
    uri, _, folder = data.removeprefix(RUN).rpartition(MASKS_OF_RUN)
    if not uri or not folder:
        raise RunRefused(
            f"{printable(data)}: a run becomes labelled data by its corrected masks; "
            f"say {RUN}RUN{MASKS_OF_RUN}FOLDER"
        )
    run, masks = open_run(uri), open_store(folder)
    if not run.finished:
        raise RunRefused(f"the run {uri} is not finished; finish it before you label what it made")
    complaint = "{} is no PNG; a corrected mask is named KEY.png"
    pngs = _pngs(masks, f"{printable(folder)}: {complaint}")
    named = ((key_of_mask(path_of(plan.key)), plan) for plan in pngs)
    found = [Piece(key, plan, key) for key, plan in named]
    if not found:
        raise RunRefused(f"{printable(folder)} holds no masks; a corrected mask is named KEY.png")
    images = [Piece(plan.key, plan, plan.key) for plan in _corrected(run, {m.name for m in found})]
    return Pile(run.ledger.config.source, masks.uri, masks, images, found, _ontology(run))


def key_of_mask(path: str) -> str:
    """The key that a corrected mask at this path of its folder is named for."""
    return path[: -len(".png")].replace("%2F", "/")


def _corrected(run: Run, wanted: set[str]) -> Iterator[PlannedImage]:
    rows = run.images.select(["image_id", "key", "status"]).to_pylist()
    ids = {r["image_id"] for r in rows if r["status"] == "done" and r["key"] in wanted}
    names = list(PlannedImage.__dataclass_fields__)
    for number in run.ledger.rounds():
        for batch in run.ledger.plan(number, [*names]).to_batches(8192):
            for row in batch.to_pylist():
                if row["image_id"] in ids and row["fragment"] >= 0:
                    yield PlannedImage(**row)


def _ontology(run: Run) -> Ontology | None:
    if not run.ledger.layout.has_masks:
        return None
    card = {"classes": run.classes, "ignore_id": run.ledger.layout.fill}
    return read_ontology(json.dumps(card).encode(), f"the model of {run.ledger.store.uri}")


# ----------------------------------------------------------------------------------------- pairing


class Problems:
    """What is wrong with labelled data, by kind: how often, and some by name."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._some: dict[str, list[str]] = {}

    def add(self, kind: str, offender: str) -> None:
        """One more."""
        self._counts[kind] += 1
        some = self._some.setdefault(kind, [])
        if len(some) < SHOWN:
            some.append(printable(offender))

    def refuse(self, what: str, hint: str = "") -> None:
        """Raise, if there is anything.

        Raises:
            RunRefused: naming up to ten of each kind, and how many more.
        """
        if not self._counts:
            return
        parts = []
        for kind, some in self._some.items():
            more = self._counts[kind] - len(some)
            rest = f" and {more} more" if more else ""
            parts.append(f"{kind} ({self._counts[kind]}): {', '.join(some)}{rest}")
        raise RunRefused(f"{what} cannot be used as labelled data: {'; '.join(parts)}{hint}")


def paired(pile: Pile, what: str) -> list[tuple[Piece, Piece | None]]:
    """Pictures with their masks, or alone if they have classes, in the order in which they lie.

    Raises:
        RunRefused: where one lacks the other, or two have one name.
    """
    problems = Problems()
    if pile.masks is None:
        _add_twice(pile.images, problems)
        for piece in (piece for piece in pile.images if not piece.label):
            problems.add("pictures without a label", piece.key)
        problems.refuse(what)
        return [(piece, None) for piece in pile.images]
    images = _by_name(pile.images, "pictures of one name", problems)
    masks = _by_name(pile.masks, "masks of one name", problems)
    for name in (name for name in images if name not in masks):
        problems.add("pictures without a mask", images[name].key)
    for name in (name for name in masks if name not in images):
        problems.add("masks without a picture", masks[name].plan.key)
    _add_twice(images.values(), problems)
    problems.refuse(what)
    return [(images[name], masks[name]) for name in images]


def _add_twice(pieces: Iterable[Piece], problems: Problems) -> None:
    for key, count in Counter(piece.key for piece in pieces).items():
        if count > 1:
            problems.add("keys that occur twice", key)


def _by_name(pieces: list[Piece], kind: str, problems: Problems) -> dict[str, Piece]:
    found: dict[str, Piece] = {}
    for piece in pieces:
        if piece.name in found:
            problems.add(kind, f"{found[piece.name].plan.key} and {piece.plan.key}")
        found[piece.name] = piece
    return found
