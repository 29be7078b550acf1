"""Which split and which stratum a labelled picture is in: lists and patterns beside the data.

Splits are lists of keys: in a JSON file (``{"train": [...], "test": [...]}``, maybe below
``"splits"``), in ``dataset.json``, or one key a line in ``train.txt``, ``val.txt`` and
``test.txt``. A name in a list is a key, a key without its suffix, or a glob of keys.
Strata are patterns in ``strata.json``: ``{"night/": "night", "*_fog_*": "fog", "": "day"}``; the
first that matches counts, a glob or else a prefix.
"""

import fnmatch
import json
from collections.abc import Callable
from typing import Any

from pipeline.errors import RunRefused, StorageMissing
from pipeline.pairing import Piece, Problems, without_suffix
from pipeline.storage import Store, absolute, open_store

ALL = "all"
"""The one split of data that has none."""
DATASET = "dataset.json"
STRATA = "strata.json"
LISTS = ("train", "val", "test")


def beside(store: Store, name: str) -> bytes | None:
    """A file that may lie beside the data."""
    try:
        return store.read(name)
    except StorageMissing:
        return None


def given_file(path: str) -> tuple[bytes, str]:
    """A file that somebody names, and its name.

    Raises:
        RunRefused: if it is not there.
    """
    folder, _, name = absolute(path).rpartition("/")
    try:
        return open_store(folder or "/").read(name), path
    except StorageMissing as error:
        raise RunRefused(f"{path} is not there: {error}") from error


def splits_of(images: list[Piece], about: Store, given: str | None, data: str) -> dict[str, str]:
    """The split of each key that is in one.

    Args:
        images: what there is, maybe with splits of its own.
        about: where lists may lie.
        given: a file of lists that wins over them.
        data: the name of it all, for what is refused.

    Raises:
        RunRefused: a list names what is not there, or one picture is in two.
    """
    lists = _lists(about, given)
    if lists is None:
        own = {image.key: image.split for image in images if image.split is not None}
        return own or {image.key: ALL for image in images}
    problems, chosen = Problems(), {}
    named: dict[str, str] = {}
    for image in images:
        named[image.key] = named[without_suffix(image.key)] = image.key
    for split, entries in lists.items():
        for entry in entries:
            keys = _meant(entry, named)
            if not keys:
                problems.add("names in a split and nowhere else", f"{entry} ({split})")
            for key in keys:
                if chosen.setdefault(key, split) != split:
                    problems.add("pictures in two splits", f"{key} ({chosen[key]}, {split})")
    problems.refuse(data)
    return chosen


def _meant(entry: str, named: dict[str, str]) -> list[str]:
    """The keys that a name in a split list means: one, or all that a glob matches."""
    if entry in named:
        return [named[entry]]
    if not any(sign in entry for sign in "*?["):
        return []
    return sorted({key for key in named.values() if fnmatch.fnmatchcase(key, entry)})


def _lists(about: Store, given: str | None) -> dict[str, list[str]] | None:
    """Names of each split; None where nobody says."""
    if given is not None:
        text, where = given_file(given)
        said = _json(text, where)
        return _checked_lists(said.get("splits", said), where)
    text, where = beside(about, DATASET), f"{about.uri}/{DATASET}"
    if text is not None and (said := _json(text, where).get("splits")) is not None:
        return _checked_lists(said, where)
    texts = {name: beside(about, f"{name}.txt") for name in LISTS}
    lists = {
        name: [line for line in map(str.strip, text.decode("utf-8", "replace").split("\n")) if line]
        for name, text in texts.items()
        if text is not None
    }
    return lists or None


def _checked_lists(said: object, where: str) -> dict[str, list[str]]:
    good = isinstance(said, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in said.values()
    )
    if not good:
        raise RunRefused(f'{where}: splits must be {{"train": [names], "test": [names], ...}}')
    return said  # pyright: ignore[reportReturnType] - checked above


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError as error:
        raise RunRefused(f"{where} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise RunRefused(f"{where} must hold a JSON object")
    return said


def strata_rule(about: Store, given: str | None) -> Callable[[str], str | None]:
    """The rule that gives a key its stratum: the first pattern that matches.

    Raises:
        RunRefused: the file is none of the kind.
    """
    text, where = (
        (beside(about, STRATA), f"{about.uri}/{STRATA}") if given is None else given_file(given)
    )
    rules = {} if text is None else _json(text, where)
    if not all(isinstance(name, str) and name for name in rules.values()):
        raise RunRefused(f'{where} must hold {{"prefix or glob": "stratum", ...}}')

    def stratum_of(key: str) -> str | None:
        return next((name for pattern, name in rules.items() if _matches(key, pattern)), None)

    return stratum_of


def _matches(key: str, pattern: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(key, pattern)
    return key.startswith(pattern)
