"""What a run folder says: whose it is, what is planned, what is committed. Nothing else remembers.

Everything here is a create-only object: ``run.json``, ``plan/NNN.parquet``,
``masks.zarr/mask/c/<f>`` (a classifier's: ``predictions/c/<f>``), ``manifest/NNN.json``. A resume
is a listing of the commits, subtracted from the plan.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import contextlib
import hashlib
import json
import platform
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.config import SegmentConfig, fingerprint
from pipeline.errors import RunRefused, StorageMissing, refuse_other_format
from pipeline.fragment import FragmentDamaged, Header, header_nbytes, read_header
from pipeline.layout import ARRAY, MASKS, Layout, class_attributes, group_json
from pipeline.plan import (
    FRAGMENTS,
    fragments_table,
    path_of_fragments,
    path_of_round,
    read_fragment,
)
from pipeline.ranged import Ranged
from pipeline.records import PlannedImage
from pipeline.storage import Found, Store
from pipeline.tables import TableDamaged, in_our_words, open_table, read_table, write_table
from pipeline.tile import Grid

FORMAT_VERSION = 1
RUN = "run.json"
FORECAST = "forecast.json"  # may be there before the run is (`maskfleet plan`)
CARD, WEIGHTS = "bundle/model.json", "bundle/weights.safetensors"
HEADER_GUESS = 256 * 1024  # one request gets the header of 1024 images (130 kB, STORE §1.3)
RESTORE = "a plan cannot be made again: restore the object"
DELETE = "delete it and run segment again"
AT_ONCE = 16  # headers read at the same time

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed fragment in a listing."""

    fragment: int
    path: str
    found: Found


class Ledger:
    """An existing run folder."""

    def __init__(self, store: Store, run: Json) -> None:
        self.store = store
        self.run = run
        self._plans: dict[int, tuple[int, pq.FileMetaData]] = {}
        """Length and footer of each plan: a long one, and the same for every fragment."""

    # ------------------------------------------------------------------------------- whose it is

    @classmethod
    def open(cls, store: Store) -> "Ledger":
        """The run at a store.

        Raises:
            RunRefused: if there is none, or one that this version cannot read.
        """
        ledger = cls.find(store)
        if ledger is None:
            raise RunRefused(
                f"{store.uri} holds no run (no {RUN}); "
                "check the path or start one with `maskfleet segment`"
            )
        return ledger

    @classmethod
    def find(cls, store: Store) -> "Ledger | None":
        """The run at a store, or None where there is none yet.

        Raises:
            RunRefused: if run.json is damaged or of another format version.
        """
        try:
            text = store.read(RUN)
        except StorageMissing:
            return None
        try:
            run = json.loads(text)
            found = run["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunRefused(
                f"{store.uri}/{RUN} is damaged ({error}); restore it or start in another folder"
            ) from error
        refuse_other_format(store.uri, found, FORMAT_VERSION)
        if not _as_written(run):
            raise RunRefused(
                f"{store.uri}/{RUN} is not what was written (its SHA-256 is another); "
                "restore it or start in another folder"
            )
        return cls(store, run)

    @classmethod
    def create(
        cls,
        store: Store,
        config: SegmentConfig,
        bundle: tuple[bytes, bytes],
        about: Json,
        frozen: Json,
    ) -> "Ledger":
        """Claim a run folder; if another driver was first, its run is returned."""
        run = {
            "format_version": FORMAT_VERSION,
            "run_id": uuid.uuid4().hex[:12],
            "token": uuid.uuid4().hex,
            "created": now(),
            "config": config.identity(),
            "fingerprint": fingerprint(config.identity()),
            "bundle": about,
            "frozen": frozen,
            "versions": versions(),
        }
        run["sha256"] = digest_of(run)
        ledger = cls(store, run)
        if not store.create(RUN, json.dumps(run, indent=1).encode() + b"\n"):
            return cls.open(store)
        ledger.ensure_bundle(bundle)
        return ledger

    def ensure_bundle(self, bundle: tuple[bytes, bytes]) -> None:
        """Copy the model into the run, if a killed driver has not."""
        for path, data in zip((WEIGHTS, CARD), (bundle[1], bundle[0]), strict=True):
            if self.store.stat(path) is None:
                self.store.create(path, data)

    def refuse_other(self, config: SegmentConfig, bundle_sha256: str) -> None:
        """Refuse to continue with another config or model.

        Raises:
            RunRefused: naming what differs.
        """
        if bundle_sha256 != self.run["bundle"]["sha256"]:
            raise RunRefused(
                f"{self.store.uri} was made with model {self.model_version}, "
                f"this is {bundle_sha256[:12]}; a new model means a new run: choose another --out"
            )
        differ = [
            f"{k} is {a!r} there, {b!r} here"
            # Not as it was written: a knob that is younger than the run had its default.
            for k, a, b in _differences(self.config.identity(), config.identity())
        ]
        if differ:
            raise RunRefused(
                f"{self.store.uri} belongs to another config ({'; '.join(differ)}); "
                "choose another --out, or drop the change"
            )

    @cached_property
    def config(self) -> SegmentConfig:
        """The config the run was created with (what may differ between calls is at its default).

        Raises:
            RunRefused: if it has knobs or values that this version does not know.
        """
        try:
            return SegmentConfig.model_validate({**self.run["config"], "out": self.store.uri})
        except ValidationError as error:
            first = error.errors()[0]
            knob = ".".join(str(part) for part in first["loc"])
            raise RunRefused(
                f"{self.store.uri}/{RUN} has config {knob}: {first['msg']}; "
                f"use the version that wrote it ({self.run['versions'].get('maskfleet')})"
            ) from error

    @property
    def layout(self) -> Layout:
        """Where answers lie."""
        return Layout(**self.run["frozen"]["layout"])

    @property
    def grid(self) -> Grid:
        """How pictures are cut."""
        return Grid(**self.run["frozen"]["grid"])

    @property
    def budget(self) -> int:
        """Padded pixels of a batch."""
        return self.run["frozen"]["budget"]

    @property
    def classes(self) -> list[Json]:
        """The ontology: id, name and color of every class, in the order of the scores."""
        return self.run["bundle"]["classes"]

    @property
    def model_version(self) -> str:
        """Name and short hash of the model, as it stands in the tables."""
        return f"{self.run['bundle']['architecture']}@{self.run['bundle']['sha256'][:12]}"

    def bundle_files(self) -> tuple[bytes, bytes]:
        """model.json and weights.safetensors as copied into the run.

        Raises:
            RunRefused: one of them is not what was copied.
        """
        card, weights = self.store.read(CARD), self.store.read(WEIGHTS)
        digest = hashlib.sha256(weights).hexdigest().encode()
        checks = {
            CARD: hashlib.sha256(card).hexdigest() == self.run["bundle"]["sha256"],
            WEIGHTS: digest in card,
        }
        for path in (path for path, good in checks.items() if not good):
            raise RunRefused(
                f"{self.store.uri}/{path} is not what was copied (its SHA-256 is another); "
                "delete it and run the same command again"
            )
        return card, weights

    # ---------------------------------------------------------------------------- what is planned

    def rounds(self) -> list[int]:
        """Numbers of the planned rounds."""
        found = (f.path.removeprefix("plan/") for f in self.listed("plan"))
        return sorted(int(n[:-8]) for n in found if n.endswith(".parquet") and n[:-8].isdigit())

    def listed(self, prefix: str) -> Iterator[Found]:
        """What lies below a folder of the run; nothing where there is no such folder yet."""
        with contextlib.suppress(StorageMissing):
            yield from self.store.list(prefix)

    @contextlib.contextmanager
    def plan_file(self, path: str) -> Iterator[Ranged]:
        """A Parquet object of the run, to be read in parts."""
        about = self.store.stat(path)
        if about is None:
            raise StorageMissing(f"{self.store.uri}/{path} is gone")
        yield Ranged(self.store, path, about.nbytes, None)

    def plan(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """A whole round's plan (some columns of it)."""
        path = path_of_round(number)
        with self._named(path, RESTORE), self.plan_file(path) as file:
            return read_table(file, columns)

    def planned(self, number: int, row_group: int) -> list[PlannedImage]:
        """The images of one fragment, in plan order: one request, once the footer is here."""
        path = path_of_round(number)
        with self._named(path, RESTORE), in_our_words():
            if number not in self._plans:
                with self.plan_file(path) as file:
                    self._plans[number] = file.nbytes, open_table(file).metadata
            nbytes, footer = self._plans[number]
            file = Ranged(self.store, path, nbytes, None)
            return read_fragment(open_table(file, footer), row_group)

    def fragments(self, number: int) -> pa.Table:
        """The fragments of a round; taken from its plan where their own table is no good."""
        try:
            return self.stored_fragments(number)
        except (StorageMissing, TableDamaged, pa.ArrowInvalid):
            return fragments_table(self.plan(number, ["fragment", "nbytes", "image_id"]))

    def stored_fragments(self, number: int) -> pa.Table:
        """The small table beside a plan, as it lies there."""
        with self.plan_file(path_of_fragments(number)) as file:
            return read_table(file).cast(FRAGMENTS)

    def add_round(self, number: int, data: bytes, fragments: pa.Table) -> None:
        """Write a round's plan, unless another driver has; then grow the array to hold it.

        Args:
            number: of the round.
            data: the plan, as `to_parquet` makes it.
            fragments: its `fragments_table`.
        """
        if self.store.create(path_of_round(number), data):
            self.store.replace(path_of_fragments(number), write_table(fragments))
        self.ensure_derived()

    def ensure_derived(self) -> None:
        """Write what follows from the plans, if a killed driver has not: tables, Zarr metadata."""
        for number in self.rounds():
            try:
                self.stored_fragments(number)
            except (StorageMissing, TableDamaged, pa.ArrowInvalid):
                table = write_table(self.fragments(number))
                self.store.replace(path_of_fragments(number), table)
        for path, data in self.array_files().items():
            if self.store.stat(path) is None or self.store.read(path) != data:
                self.store.replace(path, data)

    def array_files(self) -> dict[str, bytes]:
        """The Zarr metadata that belongs to the planned rounds, by path; none without masks."""
        if not self.layout.has_masks:
            return {}
        attributes = class_attributes(self.classes, self.layout.fill)
        files = {f"{MASKS}/zarr.json": group_json(attributes)}
        last = [pc.max(self.fragments(n)["fragment"]).as_py() for n in self.rounds()]
        if planned := [fragment for fragment in last if fragment is not None]:
            array = self.layout.array_json(max(planned) + 1, attributes)
            files[f"{ARRAY}/zarr.json"] = array
        return files

    # -------------------------------------------------------------------------- what is committed

    def commits(self) -> dict[int, Commit]:
        """Every committed fragment: one listing."""
        layout = self.layout
        found = ((layout.fragment_at(f.path), f) for f in self.listed(layout.commits))
        return {number: Commit(number, f.path, f) for number, f in found if number is not None}

    def is_committed(self, fragment: int) -> bool:
        """Whether a fragment's object is there."""
        return self.store.stat(self.layout.commit_path(fragment)) is not None

    def commit(self, fragment: int, data: bytes) -> bool:
        """Put a fragment's object; False if another's is there already."""
        return self.store.create(self.layout.commit_path(fragment), data)

    def begin_attempt(self, fragment: int) -> int:
        """Write down that work on a fragment begins; how many times it has begun before."""
        number, note = 0, json.dumps({"began": now(), "token": uuid.uuid4().hex}).encode()
        while not self.store.create(f"attempts/{fragment}/{number}", note):
            number += 1
        return number

    def header(self, commit: Commit) -> Header:
        """What a committed object says of itself.

        Raises:
            FragmentDamaged: naming the object.
        """
        start = self._start_of(commit)
        with self._named(commit.path, DELETE):
            return read_header(start)

    def headers(self, commits: list[Commit]) -> Iterator[tuple[Commit, Header]]:
        """Headers in the given order, several requests in flight, few in memory.

        Threads wait for bytes only: tables made in many threads would leave a hole in each one's
        part of the memory.
        """
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="header") as pool:
            for first in range(0, len(commits), AT_ONCE * 4):
                part = commits[first : first + AT_ONCE * 4]
                for commit, start in zip(part, pool.map(self._start_of, part), strict=True):
                    with self._named(commit.path, DELETE):
                        header = read_header(start)
                    yield commit, header

    def _start_of(self, commit: Commit) -> bytes:
        with self._named(commit.path, DELETE):
            start = self.store.read(commit.path, 0, HEADER_GUESS)
            if (need := header_nbytes(start)) > len(start):
                start = self.store.read(commit.path, 0, need)
            return start

    @contextlib.contextmanager
    def _named(self, path: str, way_out: str) -> Iterator[None]:
        """Say which object it is that is damaged, and what to do."""
        try:
            yield
        except (FragmentDamaged, TableDamaged, RunRefused) as error:
            raise type(error)(f"{self.store.uri}/{path}: {error}; {way_out}") from error

    # ------------------------------------------------------------------------------- what is final

    def manifests(self) -> list[int]:
        """Numbers of the finished rounds."""
        found = (f.path.removeprefix("manifest/") for f in self.listed("manifest"))
        return sorted(int(n[:-5]) for n in found if n.endswith(".json") and n[:-5].isdigit())

    def manifest(self, number: int) -> Json:
        """One manifest.

        Raises:
            RunRefused: it is of another format version.
            ValueError: it is damaged.
        """
        path = f"manifest/{number:03d}.json"
        said = json.loads(self.store.read(path))
        found = said.get("format_version") if isinstance(said, dict) else FORMAT_VERSION
        if isinstance(found, int):
            refuse_other_format(f"{self.store.uri}/{path}", found, FORMAT_VERSION)
        if isinstance(said, dict) and not _as_written(said):
            raise ValueError("its SHA-256 is another")
        return said


def digest_of(about: Json) -> str:
    """SHA-256 of what run.json or a manifest says besides it.

    A flipped digit in run.json would move every mask.
    """
    said = {name: value for name, value in about.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _as_written(about: Json) -> bool:
    """Whether it is what its own SHA-256 says; older objects have none."""
    return "sha256" not in about or about["sha256"] == digest_of(about)


def _differences(there: Json, here: Json, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def frozen(layout: Layout, grid: Grid, budget: int, device: str) -> Json:
    """What is found out once, when a run is created, and then holds for all its rounds."""
    inference = {"device": device, "threads": 1, "dtype": "float32", "form": "plain"}
    return {
        "budget": budget,
        "layout": asdict(layout),
        "grid": asdict(grid),
        "inference": inference,
    }


def now() -> str:
    """The time, UTC, ISO 8601: for people; nothing is ordered by it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache  # 30 ms: whole descriptions are parsed for one line each
def versions() -> dict[str, str]:
    """What the answers may depend on."""
    names = ("maskfleet", "torch", "numpy", "pillow", "simplejpeg", "zarr", "pyarrow", "ray")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
