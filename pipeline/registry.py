"""Versions of models, and the names that point at them, in a folder of any storage.

    registry.json                    this is a registry
    NAME/v0007/version.json          claims the number: who made it, from what, with what figures
    NAME/v0007/weights.safetensors
    NAME/v0007/model.json            written last: now the version exists. The folder is a bundle
    NAME/v0007/evaluations/<set>.parquet
    aliases/champion/000007.json     the seventh version that champion has meant; the highest counts
    decisions/000003/decision.json   why it was promoted, or not; decision.md for people

All of these are create-only objects and none is ever changed: of two who publish or promote at the
same time one wins and the other is told, without locks. A publication that was interrupted is
ignored by everybody but the training it belongs to, which finishes it.
"""

import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256

import pyarrow as pa

from models import Bundle
from pipeline.errors import (
    RunRefused,
    RunUnfinished,
    StorageError,
    StorageMissing,
    refuse_other_format,
)
from pipeline.keys import printable
from pipeline.ledger import now
from pipeline.storage import PREFLIGHT, Store, check_create_only, open_store
from pipeline.tables import read_table, write_table
from pipeline.versions import (
    Entry,
    Json,
    Origin,
    Version,
    checked_name,
    code_version,
    is_name,
    parse,
    path_of,
    split,
)

FORMAT_VERSION = 1
MARK = "registry.json"
CLAIM, WEIGHTS, CARD = "version.json", "weights.safetensors", "model.json"
CHAMPION = "champion"
AT_ONCE = 16  # objects read at the same time


class AliasMoved(RunUnfinished):
    """Somebody else moved the alias first; whoever looks again decides about the new one."""


class RegistryDamaged(StorageError):
    """An object of the registry is not what was written there."""


# ---------------------------------------------------------------------------------- what is meant


def resolve(text: str) -> Version:
    """The version that a reference means now.

    Raises:
        RunRefused: it is no reference, or means nothing.
    """
    registry, what = _registry(text)
    return registry.meant(what)


def pinned(text: str, began_with: str | None) -> tuple[Version, Version | None]:
    """The version a run is of, and the one its alias means by now if that is another.

    Args:
        text: a reference.
        began_with: hash of the bundle the run began with; None for a new run.
    """
    registry, what = _registry(text)
    today = registry.meant(what)
    if began_with in (None, today.sha256) or split(what):
        return today, None
    for entry in reversed(registry.history(what)):
        if entry.sha256 == began_with:
            return registry.meant(entry.version), today
    return today, None


def _registry(text: str) -> tuple["Registry", str]:
    """The registry of a reference, and what is meant in it."""
    reference = parse(text)
    if reference is None:
        raise RunRefused(
            f"{printable(text)} is no reference into a registry; write champion@REGISTRY or "
            "NAME/v0007@REGISTRY (names of lower-case letters, digits and . - _)"
        )
    return Registry.open(open_store(reference.registry)), reference.what


def tables_for(version: Version, evalset: str) -> pa.Table:
    """What a version scored on an evaluation set, image by image (`promotion.EVALUATION`).

    Raises:
        RunRefused: if it was not evaluated on it.
    """
    try:
        return read_table(open_store(version.registry).read(_evaluation(version, evalset)))
    except StorageMissing:
        raise RunRefused(
            f"{version.reference} was not evaluated on {evalset}; "
            f"run `maskfleet evaluate {version.reference} …`"
        ) from None


def _evaluation(version: Version, evalset: str) -> str:
    if not re.fullmatch(r"[0-9a-z]{1,64}", evalset):
        raise RunRefused(f"{printable(evalset)!r} is no hash of an evaluation set")
    return f"{version.path}/evaluations/{evalset}.parquet"


# ----------------------------------------------------------------------------------- the registry


class Registry:
    """An existing registry."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def open(cls, store: Store) -> "Registry":
        """The registry at a store.

        Raises:
            RunRefused: if there is none, or one that this version cannot read.
        """
        try:
            about = _json(store, MARK)
        except StorageMissing:
            raise RunRefused(
                f"{store.uri} holds no registry (no {MARK}); check the path, or publish a model "
                "there with `maskfleet train --out`. "
                "A folder whose own name holds an @ is written ./name@…"
            ) from None
        refuse_other_format(store.uri, about.get("format_version"), FORMAT_VERSION)
        return cls(store)

    @classmethod
    def found(cls, store: Store) -> "Registry":
        """The registry at a store, made if the place is empty.

        Raises:
            RunRefused: if something else lies there, or commits would not be safe there.
        """
        with contextlib.suppress(StorageMissing):
            stranger = next((f for f in store.list() if not f.path.startswith(PREFLIGHT)), None)
            if stranger is not None:
                if store.stat(MARK) is None:
                    raise RunRefused(
                        f"{store.uri} is not empty and holds no {MARK} (it has "
                        f"{printable(stranger.path)}); choose an empty folder for a registry"
                    )
                return cls.open(store)
        check_create_only(store)
        store.create(MARK, _bytes({"format_version": FORMAT_VERSION}))
        return cls.open(store)

    # ---------------------------------------------------------------------------------- versions

    def versions(self, name: str | None = None) -> list[Version]:
        """The versions of a model, or of all, oldest first."""
        found = self._listed("" if name is None else checked_name(name))
        whole = sorted(
            place
            for path in found
            if path.endswith(f"/{CARD}") and (place := split(path.removesuffix(f"/{CARD}")))
        )
        claims = [place for place in whole if f"{path_of(*place)}/{CLAIM}" in found]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="version") as pool:
            return list(pool.map(lambda place: self._claimed(*place), claims))

    def version(self, name: str, number: int) -> Version:
        """One version, its card checked against its hash.

        Raises:
            RunRefused: if there is none.
        """
        path = path_of(name, number)
        try:
            card, version = self.store.read(f"{path}/{CARD}"), self._claimed(name, number)
        except StorageMissing:
            known = ", ".join(v.path for v in self.versions(name)[-5:])
            hint = f"the newest are {known}" if known else f"there is no version of {name}"
            raise RunRefused(f"there is no {path} in {self.store.uri}; {hint}") from None
        if _hash(card, f"{self.store.uri}/{path}/{CARD}") != version.sha256:
            raise RegistryDamaged(
                f"{self.store.uri}/{path}/{CARD} is not what was published; restore it"
            )
        return version

    def meant(self, what: str) -> Version:
        """The version of an alias or of NAME/v0007.

        Raises:
            RunRefused: if it means nothing.
        """
        if (place := split(what)) is not None:
            return self.version(*place)
        entry = self.current(what)
        if entry is None:
            known = ", ".join([*self.aliases(), *(v.path for v in self.versions()[-5:])])
            raise RunRefused(
                f"there is no alias {what} in {self.store.uri} (it has {known or 'nothing yet'})"
            )
        version = self.meant(entry.version)
        if version.sha256 != entry.sha256:
            raise RegistryDamaged(f"{version.uri} is not the bundle that {what} was given to")
        return version

    def publish(self, name: str, bundle: tuple[bytes, bytes], origin: Origin) -> Version:
        """Make a version of a bundle; the one that this training has made already, if it has.

        Args:
            name: of the model; it is the folder.
            bundle: model.json and weights.safetensors.
            origin: its training, and what is known of it.

        Raises:
            RunRefused: the bundle cannot be used.
        """
        checked_name(name, "the name of a model")
        card, weights = bundle
        sha = _hash(card, "--out")
        if sha256(weights).hexdigest() != Bundle.from_json(card).weights_sha256:
            raise RunRefused(f"{WEIGHTS} and {CARD} are not of one bundle; save it again")
        claim = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "bundle_sha256": sha,
            "token": uuid.uuid4().hex,
            "created": now(),
            "code": code_version(),
            **asdict(origin),
        }
        while True:
            claims = self._claims(name)
            mine = [n for n, there in claims.items() if there["training"] == origin.training]
            for number in mine:
                if self.store.stat(f"{path_of(name, number)}/{CARD}") is not None:
                    return self.version(name, number)
            # Begun with other bytes (the training was repeated in part): that number stays unused.
            begun = [number for number in mine if claims[number]["bundle_sha256"] == sha]
            number = begun[0] if begun else max(claims, default=0) + 1
            path = path_of(name, number)
            if not begun and not self.store.create(f"{path}/{CLAIM}", _bytes(claim)):
                continue  # another training was first
            for part, data in ((WEIGHTS, weights), (CARD, card)):
                if not self.store.create(f"{path}/{part}", data):
                    raise RegistryDamaged(
                        f"{self.store.uri}/{path}/{part} is not what this training published; "
                        "publish under another training id"
                    )
            return self.version(name, number)

    def _claims(self, name: str) -> dict[int, Json]:
        """Every number of a name that was claimed, finished or not."""
        found = (path.removesuffix(f"/{CLAIM}") for path in self._listed(name))
        places = sorted(place for path in found if (place := split(path)))
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="claim") as pool:
            claims = pool.map(lambda place: self._claim(*place), places)
            return {number: claim for (_, number), claim in zip(places, claims, strict=True)}

    def _claim(self, name: str, number: int) -> Json:
        path = f"{path_of(name, number)}/{CLAIM}"
        claim = _json(self.store, path)
        wanted = {"training", "bundle_sha256", "created", "code", "recipe", "metrics"}
        if claim.get("format_version") != FORMAT_VERSION or not wanted <= claim.keys():
            raise RegistryDamaged(f"{self.store.uri}/{path} is damaged; restore it")
        return claim

    def _claimed(self, name: str, number: int) -> Version:
        claim = self._claim(name, number)
        return Version(
            self.store.uri,
            name,
            number,
            claim["bundle_sha256"],
            claim["training"],
            claim.get("parent"),
            claim.get("data_sha256"),
            claim["recipe"],
            claim["metrics"],
            claim["code"],
            claim["created"],
        )

    # ----------------------------------------------------------------------------------- aliases

    def aliases(self) -> dict[str, Entry]:
        """Every alias and what it means now."""
        names = sorted({path.split("/")[1] for path in self._listed("aliases")})
        entries = ((name, self.current(name)) for name in names if is_name(name))
        return {name: entry for name, entry in entries if entry is not None}

    def history(self, alias: str) -> list[Entry]:
        """Everything an alias has meant, oldest first."""
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="alias") as pool:
            return list(pool.map(lambda n: self._entry(alias, n), self._entries(alias)))

    def current(self, alias: str) -> Entry | None:
        """What an alias means now."""
        numbers = self._entries(alias)
        return self._entry(alias, numbers[-1]) if numbers else None

    def _entries(self, alias: str) -> list[int]:
        folder = f"aliases/{checked_name(alias, 'an alias')}"
        return sorted(_numbers(self._listed(folder), rf"{re.escape(folder)}/(\d{{6,}})\.json"))

    def _entry(self, alias: str, number: int) -> Entry:
        path = f"aliases/{alias}/{number:06d}.json"
        said = _json(self.store, path)
        try:
            return Entry(alias, number, **{name: said[name] for name in _SAID})
        except KeyError as error:
            raise RegistryDamaged(
                f"{self.store.uri}/{path} is damaged (no {error}); restore it"
            ) from error

    def move(
        self,
        alias: str,
        version: Version,
        seen: Entry | None,
        reason: str,
        decision: str | None = None,
        *,
        forced: bool = False,
    ) -> Entry:
        """Let an alias mean another version.

        Args:
            alias: made if nobody has given it yet.
            version: what it will mean.
            seen: what it meant when this was decided.
            reason: a sentence for whoever reads the history.
            decision: the folder of the decision it rests on.
            forced: whether somebody overruled the decision.

        Raises:
            AliasMoved: it means something else by now.
        """
        checked_name(alias, "an alias")
        number = 1 if seen is None else seen.number + 1
        previous = None if seen is None else seen.version
        entry = Entry(
            alias, number, version.path, version.sha256, now(), reason, decision, forced, previous
        )
        data = {"format_version": FORMAT_VERSION, **asdict(entry), "token": uuid.uuid4().hex}
        if not self.store.create(f"aliases/{alias}/{number:06d}.json", _bytes(data)):
            today = self.current(alias)
            raise AliasMoved(
                f"{alias} means {today.version if today else 'something else'} since a moment "
                f"ago, not {previous or 'nothing'}; run the same command again to look at that one"
            )
        return entry

    def rollback(self, alias: str, reason: str, to: str | None = None) -> Entry:
        """Let an alias mean again what it meant before, by one more entry.

        Args:
            alias: whose.
            reason: a sentence for whoever reads the history.
            to: a version it has meant; default: the one before the present one. Two rollbacks go
                back twice.

        Raises:
            RunRefused: there is nothing to go back to.
        """
        history = self.history(alias)
        before = _before(history)
        target = before if to is None else to
        if target is None:
            have = f"has meant {history[-1].version} only" if history else "means nothing yet"
            raise RunRefused(f"{alias} in {self.store.uri} {have}; there is nothing before it")
        if all(entry.version != target for entry in history):
            raise RunRefused(
                f"{alias} has never meant {printable(target)}; "
                f"use `maskfleet promote {printable(target)}@{self.store.uri}`"
            )
        if target == history[-1].version:
            raise RunRefused(f"{alias} means {target} already")
        return self.move(alias, self.meant(target), history[-1], reason)

    # ------------------------------------------------------------------- evaluations and decisions

    def evaluations(self, version: Version) -> list[str]:
        """The evaluation sets a version was scored on."""
        folder = f"{version.path}/evaluations/"
        names = (path.removeprefix(folder) for path in self._listed(folder.rstrip("/")))
        return sorted(name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))

    def keep_evaluation(self, version: Version, evalset: str, table: pa.Table) -> bool:
        """Put what a version scored beside it; False: it was scored on that set before."""
        return self.store.create(_evaluation(version, evalset), write_table(table))

    def keep_decision(self, record: Callable[[str], tuple[bytes, bytes]]) -> str:
        """Write a decision down under the next number.

        Args:
            record: makes page and JSON for the folder it is told; no two JSONs may be equal.

        Returns:
            The folder.
        """
        numbers = _numbers(self._listed("decisions"), r"decisions/(\d{6,})/decision\.json")
        number = max(numbers, default=0) + 1
        while True:
            folder = f"decisions/{number:06d}"
            page, text = record(folder)
            if self.store.create(f"{folder}/decision.json", text):
                self.store.create(f"{folder}/decision.md", page)
                return folder
            number += 1

    def _listed(self, folder: str) -> set[str]:
        with contextlib.suppress(StorageMissing):
            return {found.path for found in self.store.list(folder)}
        return set()


_SAID = ("version", "sha256", "when", "reason", "decision", "forced", "previous")


def _before(history: list[Entry]) -> str | None:
    """The version before the present one, where going back takes off what came after."""
    stack: list[str] = []
    for entry in history:
        if entry.version in stack:
            del stack[stack.index(entry.version) :]
        stack.append(entry.version)
    return stack[-2] if len(stack) > 1 else None


def _numbers(paths: set[str], pattern: str) -> Iterator[int]:
    return (int(match.group(1)) for path in paths if (match := re.fullmatch(pattern, path)))


def _hash(card: bytes, where: str) -> str:
    try:
        return Bundle.from_json(card).sha256
    except ValueError as error:
        raise RunRefused(f"{where}: {error}") from error


def _json(store: Store, path: str) -> Json:
    try:
        value = json.loads(store.read(path))
    except ValueError as error:
        raise RegistryDamaged(f"{store.uri}/{path} is damaged ({error}); restore it") from error
    if not isinstance(value, dict):
        raise RegistryDamaged(f"{store.uri}/{path} is damaged; restore it")
    return value


def _bytes(value: Json) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
