"""The loop: batches in, a fitted model and its history out. Knows no Ray, no storage, no files.

Shapes: B batch, C channels, H W picture, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Batch = tuple[Tensor, Tensor]
"""x_BCHW normalised, labels_BHW class indexes."""


class Diverged(ArithmeticError):
    """The loss is no number any more; the model was put back to where it still was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to train."""

    steps: int = 1000
    """Batches in all."""
    learning_rate: float = 1e-3
    """At its peak."""
    final_share: float = 0.01
    """What is left of the learning rate at the end of the cosine."""
    warmup: int = 50
    """Steps from nothing to the peak."""
    weight_decay: float = 0.01
    """Of matrices and windows; biases, norms and latents keep their size."""
    clip_norm: float = 1.0
    """Longest gradient that is followed in full."""
    ignore_id: int = 255
    """Pixels with this label teach nothing."""
    average: float = 0.0
    """Share of the past in the running mean of the weights (0.99 looks back 100 steps); 0: none."""
    keep_every: int = 50
    """Steps between two copies of a state known to be good."""
    seed: int = 0
    """Of dropout and the like; the order of the batches is the caller's."""

    def __post_init__(self) -> None:
        for name in ("steps", "keep_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup {self.warmup} must lie between 0 and steps {self.steps}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be below 1, it is {self.average}; try 0.99")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, it is {self.learning_rate}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a ramp, then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        wave = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.final_share + (1 - self.final_share) * wave)


@dataclass(frozen=True, slots=True)
class Moment:
    """What one step looked like."""

    step: int
    """Counted from 1."""
    loss: float
    learning_rate: float
    gradient_norm: float


Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits_BKHW and labels_BHW to a scalar."""


class Fit:
    """A training in progress: steps when asked, can be saved in between and taken up again."""

    def __init__(self, model: nn.Module, config: FitConfig, loss: Loss | None = None) -> None:
        self.model = model
        self.config = config
        self.done = 0
        self.loss = loss or PixelCrossEntropy(config.ignore_id)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        kept = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.mean = _copied(model) if config.average else {}
        self._good = self.state()

    def steps(self, batches: Iterable[Batch]) -> Iterator[Moment]:
        """Train on these batches until they or the configured steps end.

        Raises:
            Diverged: loss or gradient is no number; the model is back at its last good state.
        """
        device = next(self.model.parameters()).device
        for x_BCHW, labels_BHW in batches:
            if self.done >= self.config.steps:
                return
            yield self._step(x_BCHW.to(device), labels_BHW.to(device))

    def _step(self, x_BCHW: Tensor, labels_BHW: Tensor) -> Moment:
        self.model.train()
        rate = self.config.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):  # the caller's draws stay the caller's
            torch.manual_seed(self.config.seed + self.done)
            loss = self.loss(self.model(x_BCHW), labels_BHW)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        moment = Moment(self.done + 1, loss.item(), rate, norm.item())
        if not (math.isfinite(moment.loss) and math.isfinite(moment.gradient_norm)):
            self._give_up(moment)
        if self.done % self.config.keep_every == 0:
            self._good = self.state()  # these weights have just given a finite loss
        self.optimizer.step()
        self.done += 1
        for name, value in self.mean.items():
            # Early on the past is short: the share grows with it, or the start would linger.
            share = min(self.config.average, self.done / (self.done + 10))
            value.lerp_(self.model.state_dict()[name].detach(), 1 - share)
        return moment

    def _give_up(self, moment: Moment) -> None:
        self.restore(self._good)
        raise Diverged(
            f"step {moment.step}: loss {moment.loss}, gradient norm {moment.gradient_norm}, "
            f"learning rate {moment.learning_rate:.2g}; the model is back at step {self.done}. "
            "Try a lower learning rate or a longer warm-up, and look for NaN in the pictures"
        )

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, by value."""
        return {
            "done": self.done,
            "model": _copied(self.model),
            "optimizer": deepcopy(self.optimizer.state_dict()),
            "mean": {name: value.clone() for name, value in self.mean.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a state."""
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.mean = {name: value.clone() for name, value in state["mean"].items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lend the model the running mean of its weights, in eval mode; put back afterwards."""
        present = _copied(self.model)
        self.model.load_state_dict({**present, **self.mean})
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(present)

    def settle(self) -> nn.Module:
        """End the training: the averaged weights, if any, become the model's."""
        self.model.load_state_dict({**self.model.state_dict(), **self.mean})
        return self.model.eval()


def fit(model: nn.Module, batches: Iterable[Batch], config: FitConfig) -> list[Moment]:
    """Train from start to end; the model is left fitted and in eval mode."""
    training = Fit(model, config)
    history = list(training.steps(batches))
    training.settle()
    return history


@dataclass(frozen=True, slots=True)
class PixelCrossEntropy:
    """Mean over the pixels that count; 0, and no gradient, if none does."""

    ignore_id: int = 255

    def __call__(self, logits_BKHW: Tensor, labels_BHW: Tensor) -> Tensor:
        """The loss."""
        total = nn.functional.cross_entropy(
            logits_BKHW, labels_BHW, ignore_index=self.ignore_id, reduction="sum"
        )
        return total / (labels_BHW != self.ignore_id).sum().clamp(min=1)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
