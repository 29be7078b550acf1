"""How good a model is on labelled pictures: refuse what cannot be compared, measure, add up.

The pictures go through the legs of any run (pipeline/scoring.py). Every figure follows from summed
counts, and the mean IoU here is the one that the promotion gate (pipeline/promotion.py) judges.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar

import pyarrow as pa
import tyro
from pydantic import BaseModel, ConfigDict, Field

from models import Bundle
from models.training.scores import WIDTH, Confusion
from pipeline.clock import Clock
from pipeline.config import Batch, Compute, Decode, Inference, SegmentConfig, Tile
from pipeline.create import grid_for, pinned, read_bundle, read_card
from pipeline.errors import RunRefused
from pipeline.figures import About, Figures, figures_of
from pipeline.labels import (
    LabelledItem,
    LabelledSet,
    Loader,
    check,
    fragments,
    in_order,
    open_labelled,
    refuse_other_task,
)
from pipeline.ontology import Ontology
from pipeline.place import Found
from pipeline.progress import Tally, watched
from pipeline.records import Receipt
from pipeline.registry import Registry, resolve
from pipeline.scoresheet import SHOWN, Shown, sheet
from pipeline.scoretable import described
from pipeline.splits import ALL
from pipeline.storage import absolute, open_store
from pipeline.tables import write_table
from pipeline.versions import parse

if TYPE_CHECKING:
    from pipeline.scoring import Scored, Scorer

MOST_PIXELS = 16_000_000  # larger pictures are no rows of a sheet
TEST = "test"

In = TypeVar("In")
Out = TypeVar("Out")
MakeScorer = Callable[[SegmentConfig], "Scorer"]


class EvaluateConfig(BaseModel):
    """Measure how well a model does on labelled pictures."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    """What `segment --model` takes: a bundle, `demo`, champion@REGISTRY, ..."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Labelled pictures: a folder or s3:// prefix, or `run://RUN?masks=FOLDER` (docs/labels.md)."""
    split: str | None = None
    """Which of its splits; default: `test`, or everything where there are no splits."""
    out: str | None = None
    """A .parquet file for the table of pictures; or a folder for it, the rejected pictures, and
    all figures as JSON. A local path or s3://."""
    picture_sheet: str | None = None
    """A .png file: the worst, the best and some other pictures, with truth, answer and errors."""
    keep: bool = False
    """Put the table beside the model in its registry, where `promote` finds it."""
    ontology: str | None = None
    """A JSON file with classes; default: what lies beside the data."""
    splits: str | None = None
    """A JSON file with lists of keys by split; default: what lies beside the data."""
    strata: str | None = None
    """A JSON file of key patterns and stratum names; default: what lies beside the data."""
    border: float = Field(default=WIDTH, gt=0)
    """How far a border may be off for the boundary F: pixels, or below 1 a share of the diagonal
    (0.0075: Csurka et al. 2013)."""
    architecture: str | None = None
    """As of `segment`: the module outside that the bundle may name."""
    on: str = "process"
    """`process` (this one), `local` (Ray on this machine) or the address of a Ray cluster."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Machine-readable, one object."""
    log: Literal["auto", "text", "json"] = "auto"
    """auto: a live bar on a terminal, plain lines elsewhere."""
    interval_s: float = Field(default=10.0, gt=0)
    """Seconds between progress lines where there is no terminal."""
    decode: Decode = Decode()
    tile: Tile = Tile()
    batch: Batch = Batch()
    inference: Inference = Inference()
    compute: Compute = Compute()


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """A model measured."""

    figures: Figures
    table: pa.Table
    """One row per picture: `pipeline.scoring.ROWS`, described for the gate."""
    rejected: pa.Table
    sheet: bytes | None = None
    """A PNG, where one was asked for."""


# -------------------------------------------------------------------------------------- evaluating


class Workers(Protocol):
    """A place elsewhere where pictures are answered (pipeline/cluster.py)."""

    def found(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Found:
        """See `pipeline.place.Place.found`."""
        ...

    def each(self, make: Callable[[], Callable[[In], Out]], items: Sequence[In]) -> Iterator[Out]:
        """What is made of each item, in any order, by workers that are made there."""
        ...


def evaluate(
    config: EvaluateConfig, labelled: LabelledSet | None = None, workers: Workers | None = None
) -> Evaluation:
    """Measure a model; writes what the config asks for.

    Args:
        config: what to do.
        labelled: labelled pictures that are open already, of which all are measured unless the
            config names a split; else the config's data is opened.
        workers: of a cluster; default: threads of this process.

    Raises:
        RunRefused: before anything is spent.
    """
    _refuse_places(config)
    labelled, split = _chosen(config, labelled)
    asked = pinned(_as_run(config, labelled), None)
    bundle = read_bundle(asked.model)
    card = read_card(asked, bundle)
    refuse_other_task(asked.model, card.task, labelled)
    _refuse_strangers(asked.model, card, labelled.ontology)
    labelled = labelled if labelled.sha256 else check(labelled)
    make = partial(_scorer, bundle, labelled.loader, config.border)
    parts = list(fragments(labelled.items))
    begun = _there(workers, bundle, asked, make, parts) if workers else _here(asked, make, parts)
    start = time.perf_counter()
    scored = list(_watched(begun.scored, len(labelled.items), config))
    about = About(
        asked.model,
        card.task,
        card.sha256,
        labelled.name,
        split,
        labelled.sha256 or "",
        labelled.ontology.sha256,
        config.border,
        config.on,
        begun.device,
        time.perf_counter() - start,
    )
    measured = _summed(scored, labelled, about)
    if config.picture_sheet is not None:
        measured = replace(measured, sheet=_sheet(begun.scorer(), labelled, measured))
    _write(config, measured)
    return measured


@dataclass(frozen=True, slots=True)
class _Begun:
    """Pictures that are being answered."""

    device: str
    scored: "Iterator[Scored]"
    scorer: "Callable[[], Scorer]"
    """One in this process."""


def _here(asked: SegmentConfig, make: "MakeScorer", parts: list[list[LabelledItem]]) -> _Begun:
    """One model for all threads: one per core, or a few for a GPU."""
    scorer = make(asked)
    cores = len(os.sched_getaffinity(0))
    usual = cores if scorer.device == "cpu" else min(4, cores)
    scored = in_order(scorer, parts, asked.compute.workers or usual)
    return _Begun(scorer.device, scored, lambda: scorer)


def _there(
    workers: Workers,
    bundle: tuple[bytes, bytes],
    asked: SegmentConfig,
    make: "MakeScorer",
    parts: list[list[LabelledItem]],
) -> _Begun:
    """A model in every worker."""
    found = workers.found(bundle, sum(map(len, parts)), asked)
    grid_for(asked, read_card(asked, bundle), found)  # refused here and not in every worker
    # Frozen as in a run: wherever a picture is answered, it shares its batch with the same others.
    batch = asked.batch.model_copy(update={"pixels": found.budget})
    frozen = partial(make, asked.model_copy(update={"batch": batch}))
    return _Begun(found.device, workers.each(frozen, parts), frozen)


def _scorer(
    bundle: tuple[bytes, bytes], loader: Loader, border: float, asked: SegmentConfig
) -> "Scorer":
    from pipeline.scoring import scorer_of  # torch takes seconds: not for a refusal or --help

    return scorer_of(asked, bundle, loader, border)


def _summed(scored: "list[Scored]", labelled: LabelledSet, about: About) -> Evaluation:
    """Rows of all fragments in one table, counts in one sum."""
    confusion = Confusion(len(labelled.ontology.classes), labelled.ontology.ignored)
    confusion.counts_KK += sum(part.confusion_KK for part in scored)
    table = pa.concat_tables([part.rows for part in scored]).sort_by("key")
    rejected = pa.concat_tables([part.rejected for part in scored]).sort_by("key")
    figures = figures_of(table, rejected.num_rows, confusion, labelled.ontology, about)
    table = described(table, about.bundle, about.evalset, labelled.ontology.names)
    return Evaluation(figures, table, rejected)


def _refuse_places(config: EvaluateConfig) -> None:
    if config.picture_sheet is not None and not config.picture_sheet.lower().endswith(".png"):
        raise RunRefused(f"--picture-sheet {config.picture_sheet} must end in .png")
    if config.keep and parse(config.model) is None:
        raise RunRefused(
            f"--keep: {config.model} is in no registry; say champion@REGISTRY or "
            "NAME/v0007@REGISTRY, or use --out"
        )


def _chosen(config: EvaluateConfig, labelled: LabelledSet | None) -> tuple[LabelledSet, str]:
    """The pictures of the split, and its name."""
    if labelled is not None and config.split is None:
        return labelled, ", ".join(labelled.splits)
    if labelled is None:
        places = {"ontology": config.ontology, "splits": config.splits, "strata": config.strata}
        labelled = open_labelled(config.data, **places, checked=False)
    split = config.split or (TEST if set(labelled.splits) != {ALL} else ALL)
    if {item.split for item in labelled.items} == {split}:
        return labelled, split
    return labelled.only(split), split


def _as_run(config: EvaluateConfig, labelled: LabelledSet) -> SegmentConfig:
    """What a run over these pictures would be asked for."""
    return SegmentConfig(
        source=labelled.loader.images,
        out=f"{labelled.loader.images}.never-written",
        **config.model_dump(
            include={
                "model", "architecture", "log", "interval_s",
                "decode", "tile", "batch", "inference", "compute",
            }
        ),
    )  # fmt: skip


def _refuse_strangers(model: str, card: Bundle, ontology: Ontology) -> None:
    """Refuse a model that does not tell apart what the labels do."""
    mine, theirs = [entry.name for entry in card.classes], ontology.names
    if set(mine) == set(theirs):
        return
    only = [
        f"only {who} knows {', '.join(sorted(names))}"
        for who, names in (
            (f"the model {model}", set(mine) - set(theirs)),
            ("the ontology", set(theirs) - set(mine)),
        )
        if names
    ]
    raise RunRefused(
        f"model and labels have different classes: {'; '.join(only)}; classes are matched by name, "
        "give the data's with the model's names as --ontology"
    )


def _watched(scored: "Iterator[Scored]", total: int, config: EvaluateConfig) -> "Iterator[Scored]":
    """What is left of each fragment, shown as they pass."""
    passed: list[Scored] = []

    def receipts() -> Iterator[Receipt]:
        for one in scored:
            passed.append(one)
            yield one.receipt

    for _ in watched(receipts(), Tally(total), config.log, config.interval_s):
        yield passed.pop()


# ----------------------------------------------------------------------------------- what is left


def _sheet(scorer: "Scorer", labelled: LabelledSet, found: Evaluation) -> bytes:
    """The worst, the best and some of the others, answered again: only these are ever held."""
    titles = _titles(found.table)
    items = [item for item in labelled.items if item.key in titles]
    rows = {
        one.item.key: Shown.of(
            titles[one.item.key],
            one.picture.pixels.values_HWC,
            one.labels_HW,
            one.answers_HW,
            labelled.ontology,
        )
        for part in fragments(items)
        for one in scorer.answers(part, [], Clock())
    }
    return sheet([rows[key] for key in titles if key in rows], labelled.ontology)


def _titles(table: pa.Table) -> dict[str, str]:
    """What is said of each picture that is shown, in the order of the sheet."""
    columns = table.select(["key", "miou", "pixels"]).to_pylist()
    rows = [r for r in columns if r["miou"] is not None and r["pixels"] <= MOST_PIXELS]
    rows.sort(key=lambda row: (row["miou"], row["key"]))
    worst, best = rows[:SHOWN], rows[SHOWN:][-SHOWN:][::-1]
    rest = rows[SHOWN : max(SHOWN, len(rows) - SHOWN)]
    some = random.Random(0).sample(rest, min(SHOWN, len(rest)))  # noqa: S311 - the same every time
    return {
        row["key"]: f"{kind}: {row['key']}  mIoU {100 * row['miou']:.1f}"
        for kind, chosen in (("worst", worst), ("best", best), ("random", some))
        for row in chosen
    }


def _write(config: EvaluateConfig, found: Evaluation) -> None:
    if config.out is not None and config.out.lower().endswith(".parquet"):
        _put(config.out, write_table(found.table))
    elif config.out is not None:
        folder = config.out.rstrip("/")
        _put(f"{folder}/evaluation.parquet", write_table(found.table))
        _put(f"{folder}/rejected.parquet", write_table(found.rejected))
        _put(f"{folder}/figures.json", as_json(found.figures).encode())
    if config.picture_sheet is not None and found.sheet is not None:
        _put(config.picture_sheet, found.sheet)
    if config.keep:
        version = resolve(found.figures.about.model)
        registry = Registry.open(open_store(version.registry))
        registry.keep_evaluation(version, found.figures.about.evalset, found.table)


def _put(path: str, data: bytes) -> None:
    folder, _, name = absolute(path).rpartition("/")
    open_store(folder or "/").replace(name, data)


def as_json(figures: Figures) -> str:
    """All figures as one JSON object."""
    return json.dumps(asdict(figures), indent=1, allow_nan=False) + "\n"
