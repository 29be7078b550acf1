"""One round of retraining: new labels in, a proven champion out, or a reason why not.

    retrainings/ID/begun.json      champion, data and recipe of the round
    retrainings/ID/labels.parquet  every label there was
    retrainings/ID/canaries/…      runs of both models over unlabelled pictures
    retrainings/ID/record.json     written last: what came of it; record.md for people

ID follows from the labels, the champion and the recipe: a round that was killed goes on when the
same command comes again, at the next tick or by hand, and where nothing is new nothing is done.
Each step looks first whether it is done: trained (train.py), evaluated (tables beside the
versions), decided (gate.py), written down.
"""

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import pyarrow as pa
import tyro
from pydantic import ConfigDict, Field

from pipeline.archive import segment_archive
from pipeline.canaries import flips
from pipeline.config import SegmentConfig
from pipeline.decision import Rules
from pipeline.errors import RunRefused, StorageMissing
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.gate import Evidence, Look, Outcome, beside, contest
from pipeline.keys import printable
from pipeline.labels import LabelledItem, LabelledSet, hashed_share
from pipeline.ledger import now
from pipeline.place import Place
from pipeline.registry import CHAMPION, AliasMoved, Registry
from pipeline.storage import Store, open_store
from pipeline.tables import read_table, write_table
from pipeline.train import DATA, Trainers, digest_of, train
from pipeline.train_config import TrainConfig, Training
from pipeline.training_plan import opened, recipe_text
from pipeline.versions import Version

log = logging.getLogger("maskfleet")

SALT = "evaluation"
TEST = "test"
LABELS = "labels.parquet"


class RetrainConfig(Training):
    """Train on the labels there are now, and promote the new model if it is proven better."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    """What the first champion is trained from, as of `train`; later ones go on from it."""
    decide_on: str | None = None
    """The split that is never learnt from and decides; default: `test`, or a share by hash."""
    share: float = Field(default=0.2, gt=0, lt=1)
    """Of every batch of labels, that is never learnt from and decides, where no split does."""
    canaries: str | None = None
    """Unlabelled pictures, a folder or s3:// prefix: how many pixels change their class there is
    written down, and limited by --rules.flips."""
    alias: str = CHAMPION
    """What a proven candidate becomes."""
    rules: Annotated[Rules, tyro.conf.arg(name="rules")] = Rules()
    """What a candidate must show."""


class Cluster(Trainers, Place, Protocol):
    """A place elsewhere for all that a round does."""


Verdict = Literal["promote", "refuse", "undecided", "nothing new"]


@dataclass(frozen=True, slots=True)
class Round:
    """How a round ended."""

    verdict: Verdict
    record: dict[str, Any]
    folder: str
    """Where record.md is."""
    fresh: bool
    """False: nothing was new, or it was over before this call."""


def retrain(config: RetrainConfig, place: Place, cluster: Cluster | None = None) -> Round:
    """Do a round, or go on with it.

    Args:
        config: what to do.
        place: where canaries are segmented.
        cluster: where the rest is done; default: this process.

    Raises:
        RunRefused: before anything is spent.
    """
    begun = time.monotonic()
    registry = Registry.found(open_store(config.out))
    labelled = opened(config)
    deciding, learnable = _divided(config, labelled)
    _refuse_rules(config, labelled)
    champion = _champion(config, registry)
    if champion is not None and not _news(registry, champion, learnable):
        return _nothing_new(config, registry, labelled, deciding, champion)
    name = _id(config, labelled, champion)
    store = open_store(f"{registry.store.uri}/retrainings/{name}")
    if (record := _recorded(store)) is not None:
        return Round(record["verdict"], record, store.uri, fresh=False)
    _begin(store, config, labelled, champion)
    candidate = train(_training(config, champion, name), learnable, cluster).version
    for version in (candidate, champion):
        if version is not None:
            _evaluated(config, registry, version, deciding, cluster)
    look = beside(registry, deciding.sha256)
    if config.canaries is not None and champion is not None:
        look = _with_canaries(config, look, champion, candidate, store, place)
    outcome = contest(registry, candidate.path, look, config.rules, alias=config.alias, reason=None)
    if outcome.decision is None:
        raise AliasMoved(
            f"{config.alias} means {candidate.path} since a moment ago: the same round, begun "
            "twice; run the same command again to see what it decided"
        )
    record = _written(
        config, registry, store, labelled, deciding, champion, outcome, time.monotonic() - begun
    )
    return Round(record["verdict"], record, store.uri, fresh=True)


def _refuse_rules(config: RetrainConfig, labelled: LabelledSet) -> None:
    """Refuse what the decision would be refused for, before hours are spent."""
    if config.rules.flips is not None and config.canaries is None:
        raise RunRefused(f"--rules.flips {config.rules.flips} needs pictures: --canaries FOLDER")
    if config.canaries is not None and not any(open_store(config.canaries).list()):
        raise RunRefused(f"--canaries {config.canaries}: there are no pictures")
    known = labelled.ontology.names
    for name in config.rules.least_iou:
        if name not in known:
            raise RunRefused(f"--rules.least-iou: there is no class {name!r} ({', '.join(known)})")


# ---------------------------------------------------------------------------------------- the data


def _divided(config: RetrainConfig, labelled: LabelledSet) -> tuple[LabelledSet, LabelledSet]:
    """The pictures that decide, and all others.

    By hash, what decides once decides for ever, whatever is labelled later (`hashed_share`).
    """
    split = config.decide_on or (TEST if TEST in labelled.splits else None)
    if split is not None:
        keys = {item.key for item in labelled.only(split).items}
    else:
        keys = {i.key for i in labelled.items if hashed_share(i.key, config.share, SALT)}
    deciding = [item for item in labelled.items if item.key in keys]
    others = [item for item in labelled.items if item.key not in keys]
    if not deciding or not others:
        raise RunRefused(
            f"{labelled.name}: {len(deciding)} pictures decide and {len(others)} are learnt from; "
            "both need some: label more, or change --share or --decide-on"
        )
    return labelled.among(deciding), labelled.among(others)


def _champion(config: RetrainConfig, registry: Registry) -> Version | None:
    entry = registry.current(config.alias)
    if entry is None and config.model is None:
        raise RunRefused(
            f"{registry.store.uri} has no {config.alias} yet: say what the first one is trained "
            "from, e.g. --model 'latent_attention:plus s'"
        )
    return None if entry is None else registry.meant(entry.version)


def _news(registry: Registry, champion: Version, learnable: LabelledSet) -> list[LabelledItem]:
    """Pictures that the champion's training has not seen with the mask they have now."""
    seen = _used(registry, champion)
    return [item for item in learnable.items if seen.get(item.key) != digest_of(learnable, item)]


def _used(registry: Registry, version: Version) -> dict[str, str]:
    """The labels that there were when a version was trained: key, and hash of picture and mask."""
    for place in (
        f"retrainings/{version.training}/{LABELS}",
        f"trainings/{version.training}/{DATA}",
    ):
        with contextlib.suppress(StorageMissing):
            table = read_table(registry.store.read(place))
            return dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    return {}  # published by hand


def _learnt(registry: Registry, version: Version | None) -> set[str]:
    """The pictures that a version has learnt from, as far as its training says."""
    if version is not None:
        with contextlib.suppress(StorageMissing):
            table = read_table(registry.store.read(f"trainings/{version.training}/{DATA}"))
            return {row["key"] for row in table.to_pylist() if row["role"] == "learnt"}
    return set()


# --------------------------------------------------------------------------------------- the steps


def _id(config: RetrainConfig, labelled: LabelledSet, champion: Version | None) -> str:
    """What makes it this round."""
    said = {
        "labels": labelled.sha256,
        "ontology": labelled.ontology.sha256,
        "recipe": recipe_text(config),
        "champion": champion.sha256 if champion else None,
        "asked": config.model_dump(mode="json", include={
            "name", "model", "recipe", "set", "split", "held_out", "decide_on", "share", "alias",
        }),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return f"round-{digest[:16]}"


def _begin(
    store: Store, config: RetrainConfig, labelled: LabelledSet, champion: Version | None
) -> None:
    said = {
        "when": now(),
        "data": config.data,
        "labels_sha256": labelled.sha256,
        "champion": champion.path if champion else None,
    }
    keys = [item.key for item in labelled.items]
    digests = [digest_of(labelled, item) for item in labelled.items]
    store.replace(LABELS, write_table(pa.table({"key": keys, "sha256": digests})))
    store.create("begun.json", json.dumps(said, indent=1).encode() + b"\n")


def _training(config: RetrainConfig, champion: Version | None, name: str) -> TrainConfig:
    """The training of the round, which goes by its name."""
    shared = {field: getattr(config, field) for field in Training.model_fields}
    if champion is None:
        return TrainConfig(**{**shared, "model": config.model, "run": name})
    # The champion is built already: what --set says of the model was for the first one.
    changes = tuple(change for change in config.set if not change.startswith("model."))
    own = {"model": champion.reference, "set": changes, "run": name}
    return TrainConfig(**{**shared, **own})


def _evaluated(
    config: RetrainConfig,
    registry: Registry,
    version: Version,
    deciding: LabelledSet,
    cluster: Cluster | None,
) -> None:
    """Both models are measured on the same pictures; once each."""
    if deciding.sha256 in registry.evaluations(version):
        return
    asked = EvaluateConfig(
        model=version.reference,
        data=config.data,
        keep=True,
        architecture=config.architecture,
        on=config.on,
        log=config.log,
        interval_s=config.interval_s,
        compute=config.compute,
    )
    evaluate(asked, deciding, cluster)


def _with_canaries(
    config: RetrainConfig,
    look: Look,
    champion: Version,
    candidate: Version,
    store: Store,
    place: Place,
) -> Look:
    """The same evidence, and what changes on pictures that nobody has labelled."""
    runs = []
    for role, version in (("champion", champion), ("candidate", candidate)):
        run = f"{store.uri}/canaries/{role}"
        asked = SegmentConfig(
            source=str(config.canaries),
            out=run,
            model=version.reference,
            architecture=config.architecture,
            compute=config.compute,
        )
        segment_archive(asked, place, threading.Event())
        runs.append(run)
    changed = flips(*runs)

    def looked(holder: Version | None, challenger: Version) -> Evidence | None:
        found = look(holder, challenger)
        return found and Evidence(found.champion, found.candidate, changed)

    return looked


# -------------------------------------------------------------------------------------- the record


def _recorded(store: Store) -> dict[str, Any] | None:
    try:
        return json.loads(store.read("record.json"))
    except StorageMissing:
        return None


def _nothing_new(
    config: RetrainConfig,
    registry: Registry,
    labelled: LabelledSet,
    deciding: LabelledSet,
    champion: Version,
) -> Round:
    """The champion knows all labels; if its round was killed before its record, that is written."""
    store = open_store(f"{registry.store.uri}/retrainings/{champion.training}")
    record, entry = _recorded(store), registry.current(config.alias)
    if record is None and entry is not None and store.stat("begun.json") is not None:
        before = registry.meant(entry.previous) if entry.previous else None
        outcome = Outcome(champion, before, None, entry.decision, entry)
        record = _written(config, registry, store, labelled, deciding, before, outcome, None)
    folder = store.uri if record else champion.uri
    return Round("nothing new", {**(record or {}), "champion": champion.path}, folder, fresh=False)


def _written(
    config: RetrainConfig,
    registry: Registry,
    store: Store,
    labelled: LabelledSet,
    deciding: LabelledSet,
    champion: Version | None,
    outcome: Outcome,
    seconds: float | None,
) -> dict[str, Any]:
    """record.md and, last, record.json."""
    decision = json.loads(registry.store.read(f"{outcome.folder}/decision.json"))
    before = {} if champion is None else _used(registry, champion)
    decides = {item.key for item in deciding.items}
    fresh = [i for i in labelled.items if before.get(i.key) != digest_of(labelled, i)]
    record = {
        "verdict": decision["verdict"],
        "when": now(),
        "data": config.data,
        "labels_sha256": labelled.sha256,
        "pictures": len(labelled.items),
        "new": len(fresh),
        "new_by_stratum": dict(Counter(item.stratum or "" for item in fresh)),
        "deciding": len(decides),
        "deciding_learnt": len(decides & _learnt(registry, champion)),
        "evalset": deciding.sha256,
        "champion": champion.path if champion else None,
        "candidate": outcome.candidate.path,
        "decision": outcome.folder,
        "promoted_as": outcome.entry.number if outcome.entry else None,
        "champion_miou": decision["champion_miou"],
        "candidate_miou": decision["candidate_miou"],
        "metrics": outcome.candidate.metrics,
        "seconds": None if seconds is None else round(seconds, 1),
    }
    page = "\n".join(_page(config, registry, record, outcome))
    store.replace("record.md", f"{page}\n".encode("utf-8", "replace"))
    store.create("record.json", json.dumps(record, indent=1).encode() + b"\n")
    return record


def _page(
    config: RetrainConfig, registry: Registry, record: dict[str, Any], outcome: Outcome
) -> Iterator[str]:
    """One page for people."""
    holder = record["champion"] or "nobody yet"
    yield f"# {record['candidate']} against {holder}: {record['verdict']}"
    yield ""
    yield (
        f"- labels: {record['pictures']} pictures of {printable(config.data)}, {record['new']} of "
        f"them new or changed since {holder}"
    )
    for stratum, count in record["new_by_stratum"].items():
        yield f"  - new, {printable(stratum) or 'no stratum'}: {count}"
    known = record["deciding_learnt"]
    yield f"- decided on {record['deciding']} pictures that " + (
        f"the new model has not learnt from, {known} of which {holder} has: it has the advantage"
        if known
        else "neither has learnt from"
    )
    figures = record["metrics"]
    yield (
        f"- trained {figures.get('steps'):,} steps in {figures.get('seconds') or 0:.0f} s; "
        f"curves and pictures: `trainings/{outcome.candidate.training}/curves.png`, `sheet.png`"
    )
    if outcome.entry is not None and record["champion"]:
        alias = config.alias
        yield f"- undo: `maskfleet registry rollback {registry.store.uri} {alias}`"
    yield ""
    if outcome.folder is not None:
        page = registry.store.read(f"{outcome.folder}/decision.md").decode()
        yield page.replace("# ", "## Decision: ", 1)
