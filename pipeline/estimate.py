"""A total from a stratified sample, and how far off it may be.

Things are laid in order of their size and cut into strata that are tried equally often; the mean
of those tried stands for all of a stratum (Cochran, Sampling Techniques, 1977, chapter 5). A thing
counts with the root of its size, between two worse choices: by number the few large ones, which
cost the most, would hardly be tried; by size nearly nothing else, though size is not cost.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.records import Array

Z80 = 1.2816  # of the normal distribution: eight of ten lie within so many standard errors


@dataclass(frozen=True, slots=True)
class Range:
    """A figure with its 80 % interval."""

    low: float
    expected: float
    high: float

    def times(self, factor: float) -> "Range":
        """All three, scaled."""
        return Range(self.low * factor, self.expected * factor, self.high * factor)

    def holds(self, value: float) -> bool:
        """Whether a value lies within."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Stratum:
    """Things of about one size."""

    rows: Array
    """All of them, as numbers of the rows they were given in."""
    tried: Array
    """Those that stand for them."""


def strata_of(sizes: Array, strata: int, tried: int, seed: int = 0) -> list[Stratum]:
    """Cut things into strata of equal weight, and draw from each.

    Args:
        sizes: of each thing; any unit.
        strata: how many at most; fewer where there are fewer things.
        tried: things to draw in all, at least two from each stratum that has two.
        seed: of the draw.
    """
    order = np.argsort(sizes, kind="stable")
    share = np.cumsum(np.sqrt(np.maximum(sizes[order], 1)))
    place = np.minimum((share / share[-1] * strata).astype(int), strata - 1)
    draws, made = random.Random(seed), []  # noqa: S311 - no secret
    groups = [order[place == number] for number in range(strata)]
    groups = [group for group in groups if len(group)]
    each = max(2, tried // len(groups))
    for rows in groups:
        chosen = draws.sample(range(len(rows)), min(each, len(rows)))
        made.append(Stratum(rows, rows[sorted(chosen)]))
    return made


def total(strata: Sequence[Stratum], costs: Sequence[Array], spread: float = 0.0) -> Range:
    """The cost of all things.

    Args:
        strata: as they were cut.
        costs: of the things that were tried, stratum by stratum.
        spread: standard deviation, as a share, of what the sample cannot know.
    """
    expected = variance = doubt = 0.0
    for stratum, cost in zip(strata, costs, strict=True):
        count, tried = len(stratum.rows), len(stratum.tried)
        expected += count * float(np.mean(cost))
        if tried > 1:
            left = 1 - tried / count  # what was tried is known
            part = count**2 * left * float(np.var(cost, ddof=1)) / tried
            variance += part
            doubt += part**2 / (tried - 1)
    if not expected:
        return Range(0.0, 0.0, 0.0)
    # Log-normal: never below nothing, and twice as long is as likely as half as long.
    sampled, known = math.sqrt(math.log1p(variance / expected**2)), math.log1p(spread**2)
    if doubt:
        sampled *= _wider(variance**2 / doubt)
    sigma = Z80 * math.sqrt(sampled**2 + known)
    return Range(expected * math.exp(-sigma), expected, expected * math.exp(sigma))


def _wider(freedom: float) -> float:
    """Student's t over the normal quantile: the variance itself is known from a few things only.

    Cornish and Fisher's first term; the degrees of freedom are Satterthwaite's.
    """
    return 1 + (Z80**2 + 1) / (4 * max(freedom, 1.0))
