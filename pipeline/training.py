"""One worker's share of a training: pictures in, steps, and now and then a look and a checkpoint.

Start here to follow a training. `pipeline/train.py` decides what is trained and what becomes of it;
it calls `work` in its own process, or has it called on a cluster (pipeline/train_on_ray.py), once
per worker. The loop of steps itself is models/training/fit.py. Nothing here knows Ray.

A look is what `maskfleet evaluate` does, over the pictures held out, shared by the workers: so what
is measured is what will run.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

import models
from models import Bundle
from models.parts.saved import as_bytes
from models.training.batches import Batch, batch_of
from models.training.fit import Diverged, Fit, Moment
from models.training.recipes import Recipe
from models.training.scores import Confusion
from models.training.states import State
from pipeline import history
from pipeline.checkpoints import Checkpoints
from pipeline.config import SegmentConfig
from pipeline.create import read_bundle
from pipeline.errors import RunRefused, StorageError
from pipeline.labels import LabelledItem, fragments, in_order
from pipeline.patience import patiently
from pipeline.rejections import reject
from pipeline.scoring import scorer_of
from pipeline.storage import Store, open_store
from pipeline.telling import Progress, show
from pipeline.trainset import Part, TrainSet

if TYPE_CHECKING:
    from models.parts.segmenter import Segmenter

PROGRESS_S = 2.0  # between two notes of how far it is; each is one small object
RATE_STEPS = 50  # the rate and the time left are those of so many last steps


@dataclass(frozen=True, kw_only=True)
class Work:
    """Everything a worker must know; it travels to other machines."""

    uri: str
    """The training's folder."""
    call: str
    """The folder in it that this call's checkpoints go to."""
    card: Bundle
    """Of the model, as it will be published; its weights are missing."""
    parent: str | None
    """The bundle whose weights are the first; None: drawn at random."""
    architecture: str | None
    """The module outside that the bundle may name."""
    train: TrainSet
    look: Sequence[LabelledItem]
    """Pictures held out."""
    asked: SegmentConfig
    """How those are answered: what a run over them would be asked for."""
    parts: int
    """That a step comes in, over all workers."""
    every: int
    """Steps between two looks, and two checkpoints."""
    threads: int | None = None
    """Of torch; default: this machine's cores, shared by its workers."""


@dataclass(frozen=True)
class Team:
    """Which worker this is, and how it speaks to the others; by default there are none."""

    rank: int = 0
    size: int = 1
    beside: int = 1
    """Workers on this machine."""
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda net: net)
    total: Callable[[Tensor], Tensor] = field(default=lambda of_one: of_one)


Feed = Callable[[int], Iterable[Part]]
"""This worker's parts of all steps from one on, in order."""
Report = Callable[[Progress, str | None], None]
"""Takes note, with the folder of a checkpoint if one was just written; called by all workers."""


def work(job: Work, team: Team, feed: Feed, report: Report) -> str | None:
    """Train to the end, from the furthest whole checkpoint if there is one.

    Returns:
        Why it cannot go on, if it cannot: then the last good state is written down and named.
    """
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(job.threads or max(1, cores // team.beside))
    fit, checkpoints = _begun(job, team)
    store = open_store(job.uri)
    begin = fit.done
    rows = _Rows(store, begin, main=team.rank == 0)
    watch = _Watch(job, team, fit, rows)
    batches = _batches(feed(begin), job, begin, fit.parts, store)
    try:
        for moment in fit.steps(batches):
            watch.saw(moment)
            if moment.step % job.every and not fit.over:
                continue
            watch.looked(_look(job, team, fit))
            folder = _saved(checkpoints, fit, rows, team)
            report(watch.progress(), folder)
    except Diverged as problem:
        folder = _saved(checkpoints, fit, rows, team, prune=False)
        report(watch.progress(), folder)
        return f"{problem}; that state is {job.uri}/{folder}"
    if not fit.over:
        raise RuntimeError(f"pictures ended at step {fit.done} of {fit.length}")
    return None


def _begun(job: Work, team: Team) -> tuple[Fit, Checkpoints]:
    """The model as it was left, or fresh."""
    checkpoints = Checkpoints(job.uri, job.call)
    net = fresh_model(job).to(team.device)
    fit = Fit(
        team.wrap(net),
        job.train.recipe,
        pictures=len(job.train.items),
        rank=team.rank,
        parts=job.parts // team.size,
        total=team.total,
    )
    # The first worker says which: a listing may show another one something newer.
    state = checkpoints.newest() if team.rank == 0 else None
    done = torch.tensor([0 if state is None else state.done], device=team.device)
    chosen = int(team.total(done).item())
    if team.rank and chosen:
        state = checkpoints.newest(at_most=chosen)
    if chosen:
        if state is None or state.done != chosen:
            raise RuntimeError(f"worker {team.rank} cannot read the checkpoint of step {chosen}")
        fit.restore(_on(state, team.device))
    return fit, checkpoints


def fresh_model(job: Work) -> nn.Module:
    """The model before its first step: of its parent, or drawn at random from the seed."""
    if job.parent is not None:
        return models.load_bundle_bytes(*read_bundle(job.parent), job.architecture)[0]
    torch.manual_seed(job.train.recipe.seed)
    return models.build(job.card.architecture, **job.card.config)


def settled(job: Work, state: State) -> tuple[bytes, bytes]:
    """The bundle of a state: its best weights, else the averaged ones; model.json and weights."""
    net = models.build(job.card.architecture, **job.card.config)
    net.load_state_dict({**state.model, **(state.best or state.mean)})
    return as_bytes(net.eval(), job.card)


def finished(job: Work, state: State | None) -> bool:
    """Whether a training has nothing left to do."""
    recipe = job.train.recipe
    if state is None:
        return False
    length = recipe.length * (state.epoch if recipe.unit == "epochs" else 1)
    impatient = bool(recipe.patience) and state.reports_since >= recipe.patience
    return state.done >= length or impatient


def steps_of(recipe: Recipe, pictures: int) -> int:
    """Steps of a whole training."""
    return recipe.length * (-(-pictures // recipe.batch) if recipe.unit == "epochs" else 1)


def here(job: Work) -> Feed:
    """The parts of a training in one process, made by threads beside it."""

    def feed(begin: int) -> Iterator[Part]:
        places = ((step, slot) for step in count(begin) for slot in range(job.parts))
        threads = len(os.sched_getaffinity(0))
        return in_order(lambda place: job.train.part(*place, job.parts), places, threads)

    return feed


def _batches(
    parts: Iterable[Part], job: Work, begin: int, mine: int, store: Store
) -> Iterator[Batch]:
    """What the model reads of each part; a part that is not the next one is a bug."""
    for place, part in enumerate(parts):
        if part.step != begin + place // mine:
            raise RuntimeError(f"a part of step {part.step} came in step {begin + place // mine}")
        for about in part.rejected:
            patiently(partial(reject, store, *about))
        yield batch_of(part.pixels_BhwC, part.labels, job.train.recipe)


def _look(job: Work, team: Team, fit: Fit) -> float:
    """MIoU of the averaged weights over the pictures held out."""
    loader = job.train.loader
    confusion = Confusion(len(loader.ontology.classes), loader.ontology.ignored)
    mine = list(job.look)[team.rank :: team.size]
    threads = torch.get_num_threads()
    if mine:
        with fit.averaged():
            bundle = as_bytes(cast("Segmenter", fit.net), job.card)
        compute = job.asked.compute.model_copy(update={"device": team.device.partition(":")[0]})
        scorer = scorer_of(job.asked.model_copy(update={"compute": compute}), bundle, loader, 1.0)
        for scored in in_order(scorer, fragments(mine), threads):
            confusion.counts_KK += scored.confusion_KK
    torch.set_num_threads(threads)  # a scorer predicts with one a thread
    counts_KK = torch.from_numpy(confusion.counts_KK).to(team.device)
    confusion.counts_KK = team.total(counts_KK).cpu().numpy()
    return confusion.mean_found(confusion.iou_K())


def _saved(
    checkpoints: Checkpoints, fit: Fit, rows: "_Rows", team: Team, *, prune: bool = True
) -> str:
    """Write what led to the state and the state; the checkpoint's folder.

    The rows first: who goes on from the state writes none of the steps before it. A state that is
    gone back to lies behind newer ones, and would be pruned for them.
    """
    if team.rank:
        return ""
    rows.keep()
    folder = checkpoints.save(fit.state())
    if prune:
        checkpoints.prune()
    return folder


def _on(state: State, device: str) -> State:
    """The state with its tensors where the model is."""
    parts = {
        name: {key: value.to(device) for key, value in getattr(state, name).items()}
        for name in ("model", "mean", "best", "optimizer")
    }
    return replace(state, **parts)


class _Rows:
    """The history since the last checkpoint, and what had passed before it."""

    def __init__(self, store: Store, done: int, *, main: bool) -> None:
        self._store, self._main = store, main
        before = history.kept(store, until=done) if main and done else []
        self.seconds = before[-1].seconds if before else 0.0
        """Before this call."""
        self.scored = [row for row in before if row.miou is not None]
        self.fresh: list[history.Row] = []

    def keep(self) -> None:
        """Write what is new."""
        patiently(lambda: history.keep(self._store, self.fresh))
        self.fresh = []


class _Watch:
    """How far it is; the first worker says so."""

    def __init__(self, job: Work, team: Team, fit: Fit, rows: _Rows) -> None:
        self._job, self._fit, self._rows = job, fit, rows
        self._main = team.rank == 0
        self._start = time.monotonic()
        self._ends: list[float] = []
        self._told = 0.0
        self._moment: Moment | None = None

    def saw(self, moment: Moment) -> None:
        """Take note of a step."""
        self._moment = moment
        self._ends = [*self._ends[-RATE_STEPS:], time.monotonic()]
        seconds = self._rows.seconds + time.monotonic() - self._start
        self._rows.fresh.append(
            history.Row(
                moment.step, moment.loss, moment.learning_rate, moment.gradient_norm, seconds
            )
        )
        if self._main and time.monotonic() - self._told > PROGRESS_S:
            self._tell()

    def looked(self, miou: float) -> None:
        """Take note of a look, which ends a stretch of steps."""
        self._fit.scored(miou)
        if not np.isnan(miou):
            self._rows.fresh[-1] = replace(self._rows.fresh[-1], miou=miou)
            self._rows.scored.append(self._rows.fresh[-1])
        self._ends = []  # a look is no step
        if self._main:
            self._tell()

    def progress(self) -> Progress:
        """How far it is now."""
        moment, scored = self._moment, self._rows.scored
        best = max(scored, key=lambda row: row.miou or 0.0, default=None)
        spans = len(self._ends) - 1
        step_s = (self._ends[-1] - self._ends[0]) / spans if spans > 0 else None
        return Progress(
            step=self._fit.done,
            of=self._fit.length,
            loss=moment.loss if moment else None,
            miou=scored[-1].miou if scored else None,
            best=best.miou if best else None,
            best_step=best.step if best else None,
            learning_rate=moment.learning_rate if moment else None,
            pictures_per_s=self._job.train.recipe.batch / step_s if step_s else None,
            eta_s=(self._fit.length - self._fit.done) * step_s if step_s else None,
            seconds=self._rows.seconds + time.monotonic() - self._start,
        )

    def _tell(self) -> None:
        self._told = time.monotonic()
        note = self.progress()
        threading.Thread(target=_noted, args=(self._job.uri, note), daemon=True).start()


def _noted(uri: str, progress: Progress) -> None:
    """A note on storage; a store that is away for a while costs notes, not the training."""
    try:
        show(open_store(uri), progress)
    except (StorageError, OSError, RunRefused):
        return
