"""How large a step is, from the first to the last: a ramp, then one of four courses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from models.training.reading import STRICT, refuse_below, refuse_no_share, refuse_unknown

Course = Literal["cosine", "poly", "step", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The learning rate of every step."""

    __pydantic_config__ = STRICT

    peak: float = 1e-3
    """At the end of the ramp."""
    course: Course = "cosine"
    """After the ramp: half a cosine, a power of what is left, steps down, or none."""
    warmup: int = 50
    """Steps from nothing to the peak."""
    final_share: float = 0.01
    """What is left of the peak at the end; cosine and poly."""
    power: float = 0.9
    """Of what is left of the training; poly."""
    gamma: float = 0.8
    """What a step down leaves; step."""
    every: int = 12
    """Epochs between two steps down; step."""

    def __post_init__(self) -> None:
        refuse_unknown("rate.course", self.course, get_args(Course))
        if not 0 < self.peak < math.inf:
            raise ValueError(f"rate.peak must be above 0, it is {self.peak}; try 1e-3")
        refuse_below(0, self, "warmup", of="rate.")
        refuse_below(1, self, "every", of="rate.")
        refuse_no_share(self, "final_share", of="rate.")
        if not self.power > 0:
            raise ValueError(
                f"rate.power must be above 0, it is {self.power}; 1 is a straight line"
            )
        if not 0 < self.gamma <= 1:
            raise ValueError(f"rate.gamma must be above 0 and at most 1, it is {self.gamma}")

    def at(self, step: int, steps: int, epoch: int) -> float:
        """The learning rate of a step, counted from 0.

        Args:
            step: which one.
            steps: how many there are in all.
            epoch: how many an epoch has.
        """
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        if self.course == "cosine":
            return self._down_to((1 + math.cos(math.pi * done)) / 2)
        if self.course == "poly":
            return self._down_to((1 - done) ** self.power)
        if self.course == "step":
            return self.peak * self.gamma ** (step // (epoch * self.every))
        return self.peak

    def _down_to(self, share: float) -> float:
        return self.peak * (self.final_share + (1 - self.final_share) * share)
