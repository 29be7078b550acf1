"""Train a model on labelled pictures and publish what came of it.

    trainings/ID/training.json       what it is: model, data, recipe; never changed
    trainings/ID/data.parquet        every picture and what it was used for
    trainings/ID/CALL/000001200/…    checkpoints (checkpoints.py)
    trainings/ID/history/…           every step (history.py); progress.json: how far it is
    trainings/ID/rejected/…          pictures that could not be read
    trainings/ID/history.parquet, curves.png, sheet.png, figures.json, bundle/    when it is over
    trainings/ID/result.json         written last: the version that came of it

ID follows from model, data and recipe, or is given (`--run`): the same command goes on where it was
left, and another one never does. The steps themselves are in pipeline/training.py.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import pyarrow as pa

from models.training.recipes import Recipe
from pipeline import history, trackers
from pipeline.checkpoints import Checkpoints
from pipeline.config import Compute
from pipeline.errors import RunRefused, StorageError, StorageMissing
from pipeline.evaluate import EvaluateConfig, Evaluation, Workers, evaluate
from pipeline.labels import LabelledItem, LabelledSet
from pipeline.ledger import now
from pipeline.registry import Registry
from pipeline.rejections import rejected
from pipeline.storage import Store, open_store
from pipeline.tables import write_table
from pipeline.telling import as_line, shown
from pipeline.train_config import TrainConfig
from pipeline.training import Team, Work, finished, here, settled, work
from pipeline.training_plan import (
    balanced,
    identity_of,
    job_of,
    opened,
    parts_of,
    recipe_of,
    roles,
    start_of,
)
from pipeline.versions import Origin, Version, checked_name, code_version

log = logging.getLogger("maskfleet")

CANDIDATE = "candidate"
DATA = "data.parquet"


class Trainers(Workers, Protocol):
    """A place elsewhere where a training runs (pipeline/train_on_ray.py)."""

    def train(self, job: Work, most: int, least: int) -> str | None:
        """Train to the end; why it cannot go on, if it cannot."""
        ...


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it."""

    version: Version
    folder: str
    """Of the training: curves, sheet, history."""
    fresh: bool
    """False: it was over before this call."""


def train(
    config: TrainConfig, labelled: LabelledSet | None = None, trainers: Trainers | None = None
) -> Trained:
    """Train, or go on training, and publish what came of it.

    Args:
        config: what to do.
        labelled: pictures that are open and checked already; else the config's data is opened.
        trainers: of a cluster; default: this process.

    Raises:
        RunRefused: it cannot be done as asked, or the loss is no number any more.
    """
    checked_name(config.name, "the name of a model")
    trackers.expect(config.tensorboard, config.mlflow, config.name)
    labelled = labelled or opened(config)
    learnt, look = roles(config, labelled)
    start = start_of(config, labelled)
    recipe = recipe_of(config, start.card, labelled.ontology)
    parts_of(config, recipe)
    identity = identity_of(config, learnt, look, start, recipe)
    training = config.run or identity["sha256"][:16]
    checked_name(training, "the id of a training")
    registry = Registry.found(open_store(config.out))
    store = open_store(f"{registry.store.uri}/trainings/{training}")
    _begun(store, identity)
    if (over := _result(registry, store)) is not None:
        return Trained(over, store.uri, fresh=False)
    record = _record(store, identity, lambda: balanced(recipe, learnt))
    recipe = Recipe.from_json(record["recipe"])
    store.replace(DATA, write_table(_used(labelled, learnt, look)))
    job = job_of(config, store, start, learnt, look, recipe)
    _train(job, store, config, trainers)
    version = _publish(config, registry, store, training, job, labelled.among(look.items), trainers)
    return Trained(version, store.uri, fresh=True)


# ------------------------------------------------------------------------------------ its folder


def _record(
    store: Store, identity: dict[str, Any], balanced: Callable[[], Recipe]
) -> dict[str, Any]:
    """training.json: as it was begun, or written now."""
    if (found := _begun(store, identity)) is not None:
        return found
    recipe = balanced().to_json()
    record = {**identity, "recipe": recipe, "created": now(), "code": code_version()}
    if store.create("training.json", json.dumps(record, indent=1).encode() + b"\n"):
        return record
    return _begun(store, identity) or record


def _begun(store: Store, identity: dict[str, Any]) -> dict[str, Any] | None:
    """training.json, if it was begun; refuses a folder that is another training's."""
    try:
        found = json.loads(store.read("training.json"))
    except StorageMissing:
        return None
    if found["sha256"] != identity["sha256"]:
        differs = [
            key for key in identity if key not in {"sha256", "about", "recipe"}
            and found.get(key) != identity[key]
        ] or ["recipe"]  # fmt: skip
        raise RunRefused(
            f"{store.uri} is another training ({', '.join(differs)} differ); "
            "choose another --run, or say what you said then"
        )
    return found


def _result(registry: Registry, store: Store) -> Version | None:
    """The version that a training made, if it is over."""
    try:
        said = json.loads(store.read("result.json"))
    except StorageMissing:
        return None
    return registry.meant(said["version"])


def digest_of(labelled: LabelledSet, item: LabelledItem) -> str:
    """A hash of a picture, its mask and its split."""
    line = labelled.lines[item.key]
    return hashlib.sha256(line.encode("utf-8", "surrogateescape")).hexdigest()


def _used(labelled: LabelledSet, learnt: LabelledSet, look: LabelledSet) -> pa.Table:
    """Every picture, what it is used for, and a hash of picture and mask."""
    roles = {item.key: "learnt" for item in learnt.items}
    roles |= {item.key: "held out" for item in look.items}
    return pa.table(
        {
            "key": [item.key for item in labelled.items],
            "role": [roles.get(item.key) for item in labelled.items],
            "split": [item.split for item in labelled.items],
            "stratum": [item.stratum for item in labelled.items],
            "sha256": [digest_of(labelled, item) for item in labelled.items],
        },
        schema=pa.schema([(n, pa.string()) for n in ("key", "role", "split", "stratum", "sha256")]),
    )


# --------------------------------------------------------------------------------------- the steps


def _train(job: Work, store: Store, config: TrainConfig, trainers: Trainers | None) -> None:
    """To the end, wherever it was left."""
    if finished(job, Checkpoints(job.uri, job.call).newest()):
        return
    with _told(store, config):
        if trainers is None:
            team = Team(device=_device(config.compute))
            refusal = work(job, team, here(job), lambda *_: None)
        else:
            least = config.least_workers or config.workers
            refusal = trainers.train(job, config.workers, least)
    if refusal is not None:
        raise RunRefused(refusal)


def _device(compute: Compute) -> str:
    from pipeline.infer import device_of  # torch takes seconds: not for a refusal or --help

    return device_of(compute.device)


@contextmanager
def _told(store: Store, config: TrainConfig) -> Iterator[None]:
    """Progress lines while it trains, wherever it does."""
    ended = threading.Event()

    def tell() -> None:
        last = -1
        while not ended.wait(config.interval_s):
            try:
                progress = shown(store)
            except StorageError:  # away for a while: that costs lines, not all that follow
                continue
            if progress is not None and progress.step != last:
                last = progress.step
                line = json.dumps(asdict(progress)) if config.log == "json" else as_line(progress)
                log.info("%s", line)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join(timeout=5)


# ----------------------------------------------------------------------------------- what is left


def _publish(
    config: TrainConfig,
    registry: Registry,
    store: Store,
    training: str,
    job: Work,
    look: LabelledSet,
    trainers: Trainers | None,
) -> Version:
    """Measure what came of it, write it down, and make it a version."""
    state = Checkpoints(job.uri, job.call).newest()
    if state is None:
        raise RunRefused(f"{store.uri} has no whole checkpoint; run the same command again")
    bundle = settled(job, state)
    for name, data in zip(("model.json", "weights.safetensors"), bundle, strict=True):
        store.replace(f"bundle/{name}", data)
    found = _measured(config, store, look, trainers)
    rows = history.kept(store, until=state.done)
    table = history.table_of(rows)
    store.replace("history.parquet", write_table(table))
    store.replace("curves.png", history.curves(rows, f"{config.name}, training {training}"))
    store.replace("rejected.parquet", write_table(rejected(store)))
    record = json.loads(store.read("training.json"))
    metrics = {
        "miou": found.figures.miou,
        "pixel_accuracy": found.figures.pixel_accuracy,
        "iou": {one.name: one.iou for one in found.figures.classes},
        "pictures": found.figures.images,
        "steps": state.done,
        "seconds": rows[-1].seconds if rows else None,
    }
    origin = Origin(
        training=training,
        parent=record["about"]["parent_version"],
        data_sha256=record["data_sha256"],
        recipe=record["recipe"],
        metrics=metrics,
    )
    version = registry.publish(config.name, bundle, origin)
    current = registry.current(CANDIDATE)
    if current is None or current.version != version.path:
        registry.move(CANDIDATE, version, current, f"trained as {training}")
    trackers.tell(config.tensorboard, config.mlflow, config.name, training, rows, metrics)
    store.replace("result.json", json.dumps({"version": version.path}).encode())
    return version


def _measured(
    config: TrainConfig, store: Store, look: LabelledSet, trainers: Trainers | None
) -> Evaluation:
    """What it scores on the pictures held out, with a sheet of some."""
    asked = EvaluateConfig(
        model=f"{store.uri}/bundle",
        data=config.data,
        out=f"{store.uri}/evaluation",
        picture_sheet=f"{store.uri}/sheet.png",
        architecture=config.architecture,
        on=config.on,
        compute=config.compute,
    )
    return evaluate(asked, look, trainers)
