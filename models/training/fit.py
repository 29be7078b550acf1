"""The loop: batches in, a fitted model and its history out. Knows no Ray, no storage, no files.

A step may be shared. The model may be wrapped in DistributedDataParallel, and a batch may come in
parts; the loss is divided by what all workers and parts of the step hold together, so that two
workers with b pictures each do what one does with 2 b, up to rounding. (Not so where pictures of a
batch meet: batch norms of each worker see their own; see `Recipe.frozen_statistics`.)

The order of the batches is the caller's. To go on from a state, hand in those after `done` steps.

Shapes: B batch, C channels, H W picture, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from models.training.losses import Loss
from models.training.optimizers import memory_of, optimizer_of, remind
from models.training.states import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from models.training.batches import Batch
    from models.training.recipes import Recipe

Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over all workers; called by all of them alike."""
APART = 1_000_003
"""Between the seeds of two workers: a prime beyond the steps of a training."""


class Diverged(ArithmeticError):
    """The loss is no number any more; the model was put back to where it still was."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What one step looked like."""

    step: int
    """Counted from 1."""
    loss: float
    """Of all workers."""
    learning_rate: float
    gradient_norm: float


class Fit:
    """A training in progress: steps when asked, can be saved in between and taken up again.

    The model stays on its device, in training mode after a step; on a GPU it is laid out with
    channels last (wrap it in DistributedDataParallel after doing that yourself).
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        pictures: int | None = None,
        rank: int = 0,
        parts: int | None = None,
        total: Total | None = None,
    ) -> None:
        """Ready for step 1.

        Args:
            model: wrapped in DistributedDataParallel where several workers share a step.
            recipe: how to train; class weights as numbers.
            pictures: how many an epoch has, of all workers; needed where the recipe has epochs.
            rank: which worker this is: each drops out other values.
            parts: that this worker's share of a step comes in; default: `Recipe.accumulate`.
            total: adds up over all workers; needed where there are several.
        """
        self.model = model
        self.net = model.module if isinstance(model, DistributedDataParallel) else model
        self.device = next(self.net.parameters()).device
        if self.device.type == "cuda" and self.net is model:
            nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
        elif self.net is not model and total is None:
            raise ValueError("workers that share a step need total=, a sum over all of them")
        self.recipe, self.rank = recipe, rank
        self.parts = parts or recipe.accumulate
        self.total = total or (lambda of_one: of_one)
        self.epoch = _epoch(recipe, pictures)
        self.length = recipe.length * (self.epoch if recipe.unit == "epochs" else 1)
        self.loss = Loss(recipe.loss, recipe.ignore_id)
        self.optimizer = optimizer_of(self.net, recipe)
        self.done = 0
        self.best_figure: float | None = None
        self.reports_since = 0
        self.mean = _copied(self.net.state_dict()) if recipe.average else {}
        self.best: dict[str, Tensor] = {}
        self._good = self.state()

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        patient = not self.recipe.patience or self.reports_since < self.recipe.patience
        return self.done >= self.length or not patient

    def steps(self, batches: Iterable[Batch]) -> Iterator[Moment]:
        """Train until the batches of a worker end, or the recipe does.

        Args:
            batches: of equal numbers of pictures; `parts` of them make a step of this worker.

        Raises:
            Diverged: loss or gradient is no number; the model is back at its last good state.
        """
        ready = iter(batches)
        while not self.over:
            parts = [
                (x.to(self.device, non_blocking=True), labels.to(self.device, torch.int64))
                for x, labels in islice(ready, self.parts)
            ]
            workers, with_parts, counts_2 = self._whole(parts)
            if with_parts < workers:
                return
            yield self._step(parts, workers, counts_2)

    def _whole(self, parts: Sequence[Batch]) -> tuple[int, int, Tensor]:
        """Workers, those of them that have something to do, and what the labels of all hold."""
        here = torch.tensor([1, bool(parts), 0, 0], device=self.device)
        for _, labels in parts:
            here[2:] += self.loss.counts(labels)
        whole = self.total(here)
        workers, with_parts = whole[:2].tolist()
        return workers, with_parts, whole[2:]

    def _step(self, parts: Sequence[Batch], workers: int, counts_2: Tensor) -> Moment:
        # Before the norms have seen this batch; good once these weights gave a number.
        before = self.state() if self.done % self.recipe.keep_every == 0 else self._good
        self._into_training()
        rate = self.recipe.rate.at(self.done, self.length, self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        moment = self._gradients(parts, workers, counts_2, rate, bf16=self.recipe.bf16)
        if self.recipe.bf16 and math.isfinite(moment.loss) and not _finite(moment):
            # Seen on CPUs: a backward pass in bfloat16 that is NaN once and not the next time.
            moment = self._gradients(parts, workers, counts_2, rate, bf16=False)
        if not _finite(moment):
            self._give_up(moment)
        self._good = before
        self.optimizer.step()
        self.done += 1
        self._remember()
        return moment

    def _gradients(
        self, parts: Sequence[Batch], workers: int, counts_2: Tensor, rate: float, *, bf16: bool
    ) -> Moment:
        """Gradients of all parts of all workers, clipped."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        with self._own_draws():
            for i, (x, labels) in enumerate(parts, start=1):
                with self._gradients_shared(now=i == len(parts)):
                    share = self._share(x, labels, counts_2, bf16=bf16)
                    (workers * share).backward()  # gradients of workers are averaged, not summed
                loss += share.detach()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_norm or math.inf)
        return Moment(self.done + 1, self.total(loss).item(), rate, norm.item())

    def _into_training(self) -> None:
        self.model.train()
        if self.recipe.frozen_statistics:
            for layer in self.net.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Chance that follows from the step alone; the caller's draws stay the caller's."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.recipe.seed + self.done + APART * self.rank)
            yield

    def _gradients_shared(self, *, now: bool) -> AbstractContextManager[None]:
        """Workers add up their gradients after the last part of a step only."""
        if isinstance(self.model, DistributedDataParallel) and not now:
            return self.model.no_sync()
        return nullcontext()

    def _share(self, x: Tensor, labels: Tensor, counts_2: Tensor, *, bf16: bool) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.model(x)
        return self.loss(logits.float() if bf16 else logits, labels, counts_2)

    def _remember(self) -> None:
        """Move the running mean towards the present weights."""
        # Early on the past is short: the share grows with it, or the start would linger.
        share = min(self.recipe.average, self.done / (self.done + 10))
        present = self.net.state_dict()
        for name, value in self.mean.items():
            if value.is_floating_point():
                value.lerp_(present[name], 1 - share)
            else:
                value.copy_(present[name])  # a counter of a batch norm

    def _give_up(self, moment: Moment) -> None:
        self.restore(self._good)
        raise Diverged(
            f"step {moment.step}: loss {moment.loss}, gradient norm {moment.gradient_norm}, "
            f"learning rate {moment.learning_rate:.2g}; the model is back at step {self.done}. "
            "Try a lower learning rate or a longer warm-up, and look for NaN in the pictures"
        )

    def scored(self, figure: float) -> bool:
        """Take note of how good the averaged weights are now, higher being better.

        All workers must report the same figure.

        Returns:
            Whether it is the best so far. Where the recipe has patience, these weights are kept.
        """
        if math.isnan(figure) or (self.best_figure is not None and figure <= self.best_figure):
            self.reports_since += 1
            return False
        self.best_figure, self.reports_since = figure, 0
        if self.recipe.patience:
            self.best = _copied({**self.net.state_dict(), **self.mean})
        return True

    def state(self) -> State:
        """Everything needed to go on, by value."""
        return State(
            recipe=self.recipe.to_json(),
            epoch=self.epoch,
            done=self.done,
            best_figure=self.best_figure,
            reports_since=self.reports_since,
            model=_copied(self.net.state_dict()),
            mean=_copied(self.mean),
            best=_copied(self.best),
            optimizer=_copied(memory_of(self.optimizer, self.net)),
        )

    def restore(self, state: State) -> None:
        """Go back, or on, to a state.

        Raises:
            ValueError: it is of another recipe, model or number of pictures.
        """
        self._refuse_strangers(state)
        self.net.load_state_dict(dict(state.model))
        self.done = state.done
        self.best_figure, self.reports_since = state.best_figure, state.reports_since
        self.mean, self.best = (_copied(part, self.device) for part in (state.mean, state.best))
        remind(self.optimizer, self.net, state.optimizer)
        self._good = state

    def _refuse_strangers(self, state: State) -> None:
        state.refuse_other(self.recipe.to_json())
        if state.epoch != self.epoch:
            raise ValueError(
                f"an epoch of the state has {state.epoch} steps, here it has {self.epoch}: the "
                "data is not the same; go on with the old data, or start anew"
            )
        for name, value in self.net.state_dict().items():
            if name not in state.model or state.model[name].shape != value.shape:
                raise ValueError(
                    f"the state is of another model: it has no {name} of {tuple(value.shape)}"
                )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lend the model the running mean of its weights, in eval mode; put back afterwards."""
        present = _copied(self.net.state_dict())
        self.net.load_state_dict({**present, **self.mean})
        self.net.eval()
        try:
            yield
        finally:
            self.net.load_state_dict(present)

    def settle(self) -> nn.Module:
        """End the training: the best weights, or else the averaged ones, become the model's."""
        self.net.load_state_dict({**self.net.state_dict(), **(self.best or self.mean)})
        return self.net.eval()


def fit(model: nn.Module, batches: Iterable[Batch], recipe: Recipe) -> list[Moment]:
    """Train from start to end; the model is left fitted and in eval mode."""
    training = Fit(model, recipe)
    history = list(training.steps(batches))
    training.settle()
    return history


def _epoch(recipe: Recipe, pictures: int | None) -> int:
    """Steps in an epoch."""
    if pictures is None:
        if recipe.unit == "epochs" or recipe.rate.course == "step":
            raise ValueError(
                "the recipe speaks of epochs: say how many pictures one has, or set "
                "unit steps and another rate.course than step"
            )
        return 1
    if pictures < 1:
        raise ValueError(f"an epoch needs pictures, it has {pictures}")
    return -(-pictures // recipe.batch)


def _finite(moment: Moment) -> bool:
    return math.isfinite(moment.loss) and math.isfinite(moment.gradient_norm)


def _copied(values: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    return {name: value.detach().to(device, copy=True) for name, value in values.items()}
