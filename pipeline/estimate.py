"""A total from a sample drawn in two steps, and how far off it may be.

Bytes are known of everything, the size that matters only of what was looked at, the cost only of
what was tried. So things are cut into strata by their bytes, and many are drawn to be looked at;
these are cut into strata by their size, and a few are drawn to be tried (double sampling, Cochran,
Sampling Techniques, 1977, chapters 5 and 12). What was tried says what a unit of size costs in its
stratum (the ratio estimator, chapter 6), what was looked at how many units there are: a few large
things that nobody has tried are in the total all the same.

A thing counts with the root of its size, between two worse choices: by number the few large ones,
which cost the most, would hardly be drawn; by size nearly nothing else, though size is not cost.
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
    """Those that were drawn to stand for them."""


def strata_of(
    sizes: Array, strata: int, drawn: int, seed: int = 0, weights: Array | None = None
) -> list[Stratum]:
    """Cut things into strata of equal weight, and draw from each.

    Args:
        sizes: of each thing; any unit; 0 where it is not known: a stratum of its own.
        strata: how many at most; fewer where there are fewer things.
        drawn: things to draw in all, at least two from each stratum that has two.
        seed: of the draw.
        weights: how many things each one stands for.
    """
    order = np.argsort(sizes, kind="stable")
    unknown, order = np.split(order, [int(np.count_nonzero(sizes <= 0))])
    groups = [unknown]
    if len(order):
        each = np.sqrt(sizes[order]) * (1.0 if weights is None else weights[order])
        share = np.cumsum(each)
        place = np.minimum((share / share[-1] * strata).astype(int), strata - 1)
        groups += [order[place == number] for number in range(strata)]
    draws, made = random.Random(seed), []  # noqa: S311 - no secret
    groups = [group for group in groups if len(group)]
    each = max(2, drawn // len(groups))
    for rows in groups:
        chosen = draws.sample(range(len(rows)), min(each, len(rows)))
        made.append(Stratum(rows, rows[sorted(chosen)]))
    return made


@dataclass(frozen=True, slots=True)
class Sample:
    """Things that were looked at, and those of them that are tried."""

    looked_at: list[Stratum]
    """Of all things, by what is known of everything."""
    sizes: Array
    """Of what was looked at, stratum by stratum; 0 where it could not be told."""
    tried: list[Stratum]
    """Of what was looked at, by size: numbers of places in `sizes`."""

    @classmethod
    def of(
        cls, looked_at: list[Stratum], sizes: Array, strata: int, drawn: int, seed: int = 0
    ) -> "Sample":
        """The second draw, once sizes are known; see `strata_of`."""
        tried = strata_of(sizes, strata, drawn, seed, weights=_weights(looked_at))
        return cls(looked_at, sizes, tried)

    @property
    def rows(self) -> list[Array]:
        """What is tried, as numbers of the rows that all things were given in, by stratum."""
        rows = np.concatenate([stratum.tried for stratum in self.looked_at])
        return [rows[stratum.tried] for stratum in self.tried]

    def total(
        self, costs: Sequence[Array], *, by_size: bool = True, spread: float = 0.0
    ) -> "Range":
        """The cost of all things.

        Args:
            costs: of the things that were tried, stratum by stratum.
            by_size: whether it goes with the size within a stratum; else with the number.
            spread: standard deviation, as a share, of what the sample cannot know.
        """
        weights = _weights(self.looked_at)
        units = np.where(self.sizes > 0, self.sizes, 1) if by_size else np.ones(len(self.sizes))
        fitted, parts = np.zeros(len(units)), []
        for stratum, cost in zip(self.tried, costs, strict=True):
            tried, weight = stratum.tried, weights[stratum.tried]
            rate = float((weight * cost).sum() / (weight * units[tried]).sum())
            fitted[stratum.rows] = rate * units[stratum.rows]
            off = cost - rate * units[tried]
            parts.append(_part(float(weights[stratum.rows].sum()), off))
        ends = np.cumsum([len(stratum.tried) for stratum in self.looked_at])
        for stratum, cost in zip(self.looked_at, np.split(fitted, ends[:-1]), strict=True):
            parts.append(_part(len(stratum.rows), cost))
        return _range(float((weights * fitted).sum()), parts, spread)


def _weights(strata: Sequence[Stratum]) -> Array:
    """How many things each of those drawn stands for."""
    return np.concatenate([np.full(len(s.tried), len(s.rows) / len(s.tried)) for s in strata])


def _part(things: float, drawn: Array) -> tuple[float, int]:
    """Variance that a stratum brings to the total, and its degrees of freedom."""
    freedom = len(drawn) - 1
    if freedom < 1:
        return 0.0, 1
    left = 1 - len(drawn) / things  # what was drawn is known
    return things**2 * left * float(np.var(drawn, ddof=1)) / len(drawn), freedom


def _range(expected: float, parts: Sequence[tuple[float, int]], spread: float) -> Range:
    if not expected:
        return Range(0.0, 0.0, 0.0)
    variance = sum(part for part, _ in parts)
    doubt = sum(part**2 / freedom for part, freedom in parts)
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
