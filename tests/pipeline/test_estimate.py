"""Totals from samples drawn in two steps, against populations that are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.estimate import Range, Sample, strata_of

LOOKED_AT = 500


def population(seed: int, things: int = 3000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes, pixels and costs as archives have them: a few large things, which bytes hardly show.

    A cost is something for each thing and something for each pixel, give or take a third.
    """
    draws = np.random.default_rng(seed)
    pixels = draws.lognormal(11, 0.6, things)
    pixels[: things // 75] *= 8  # one in 75 is far larger than the others
    nbytes = pixels**0.4 * draws.lognormal(5, 0.5, things)
    costs = (0.2 + pixels / 1e5) * draws.lognormal(0, 0.3, things)
    return nbytes.astype(int), pixels.astype(int), costs


def sample_of(nbytes, pixels, seed=0, looked_at=LOOKED_AT, drawn=64, strata=8) -> Sample:
    first = strata_of(nbytes, 16, looked_at, seed)
    rows = np.concatenate([stratum.tried for stratum in first])
    return Sample.of(first, pixels[rows], strata, drawn, seed)


def of_tried(sample, values) -> list[np.ndarray]:
    return [values[rows].astype(float) for rows in sample.rows]


@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=300),
    st.integers(1, 12),
    st.integers(1, 100),
)
def test_every_thing_is_in_one_stratum_and_each_stratum_is_tried(sizes, strata, tried):
    made = strata_of(np.array(sizes), strata, tried)

    assert sorted(row for one in made for row in one.rows) == list(range(len(sizes)))
    assert 1 <= len(made) <= strata + 1
    for one in made:
        assert set(one.tried) <= set(one.rows)
        assert len(set(one.tried)) == len(one.tried) >= min(2, len(one.rows))


def test_things_of_no_known_size_are_a_stratum_of_their_own():
    made = strata_of(np.array([5, 0, 7, 0, 0, 9]), 2, 6)

    assert sorted(made[0].rows) == [1, 3, 4]


def test_where_everything_is_tried_the_total_is_known():
    nbytes, pixels, costs = population(0, 30)
    sample = sample_of(nbytes, pixels, looked_at=10_000, drawn=10_000)

    found = sample.total(of_tried(sample, costs))

    assert found.expected == pytest.approx(costs.sum())
    assert found.low == pytest.approx(found.high)


def test_where_everything_was_looked_at_its_size_is_known_whatever_is_tried():
    nbytes, pixels, _ = population(0, 600)
    sample = sample_of(nbytes, pixels, looked_at=10_000)

    found = sample.total(of_tried(sample, pixels))

    assert found.expected == pytest.approx(pixels.sum())
    assert found.low == pytest.approx(found.high)


@pytest.mark.parametrize("looked_at", [LOOKED_AT, 10_000])
def test_eight_of_ten_intervals_hold_the_truth_and_the_mean_is_not_biased(looked_at):
    nbytes, pixels, costs = population(0)
    held, off = [], []
    for seed in range(200):
        sample = sample_of(nbytes, pixels, seed, looked_at)
        found = sample.total(of_tried(sample, costs))
        held.append(found.holds(costs.sum()))
        off.append(found.expected / costs.sum() - 1)

    assert 0.72 <= np.mean(held) <= 0.9
    assert abs(np.mean(off)) < 0.02


@pytest.mark.parametrize("drawn", [300, 500])
def test_intervals_hold_the_truth_also_where_most_of_what_was_looked_at_is_tried(drawn):
    nbytes, pixels, costs = population(0)
    held = []
    for seed in range(100):
        sample = sample_of(nbytes, pixels, seed, drawn=drawn)
        held.append(sample.total(of_tried(sample, costs)).holds(costs.sum()))

    assert 0.7 <= np.mean(held) <= 0.92


def test_large_things_that_nobody_has_tried_are_in_the_total():
    nbytes, pixels = np.full(600, 1000), np.full(600, 10_000)
    pixels[:8] = 2_000_000
    sample = sample_of(nbytes, pixels, looked_at=600, drawn=64)

    found = sample.total([pixels[rows] / 1e6 for rows in sample.rows])

    assert found.expected == pytest.approx(pixels.sum() / 1e6)


def test_looking_at_many_makes_the_interval_narrower_than_trying_alone():
    nbytes, pixels, costs = population(1)

    def width(pixels: np.ndarray) -> float:
        sample = sample_of(nbytes, pixels, looked_at=10_000)
        found = sample.total(of_tried(sample, costs))
        return found.high / found.low

    assert width(pixels) < width(np.zeros_like(pixels))


def test_what_is_counted_by_number_does_not_go_with_the_size():
    nbytes, pixels, _ = population(2)
    rejected = (np.arange(len(pixels)) % 4 == 0).astype(float)
    sample = sample_of(nbytes, pixels, looked_at=10_000, drawn=1000)

    found = sample.total(of_tried(sample, rejected), by_size=False)

    assert found.expected == pytest.approx(rejected.sum(), rel=0.15)


def test_a_spread_widens_the_interval_evenly():
    sample = sample_of(np.ones(10, int), np.ones(10, int))
    found = sample.total([np.full(len(rows), 3.0) for rows in sample.rows], spread=0.1)

    assert found.low < 30 < found.high
    assert found.low * found.high == pytest.approx(30**2)


def test_what_costs_nothing_costs_nothing():
    sample = sample_of(np.ones(10, int), np.ones(10, int))
    assert sample.total([np.zeros(len(rows)) for rows in sample.rows]) == Range(0.0, 0.0, 0.0)
