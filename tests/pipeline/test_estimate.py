"""Totals from stratified samples, against populations that are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.estimate import Range, strata_of, total


def population(seed: int, things: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Sizes as archives have them, a few large and many small; costs that go with them, roughly."""
    draws = np.random.default_rng(seed)
    sizes = draws.lognormal(11, 1, things)
    return sizes.astype(int), sizes * draws.lognormal(0, 0.5, things) / 1e5


@given(
    st.lists(st.integers(0, 10**9), min_size=1, max_size=300),
    st.integers(1, 12),
    st.integers(1, 100),
)
def test_every_thing_is_in_one_stratum_and_each_stratum_is_tried(sizes, strata, tried):
    made = strata_of(np.array(sizes), strata, tried)

    assert sorted(row for one in made for row in one.rows) == list(range(len(sizes)))
    assert 1 <= len(made) <= strata
    for one in made:
        assert set(one.tried) <= set(one.rows)
        assert len(set(one.tried)) == len(one.tried) >= min(2, len(one.rows))


def test_where_everything_is_tried_the_total_is_known():
    sizes = np.arange(1, 30)
    strata = strata_of(sizes, 4, 10_000)

    found = total(strata, [sizes[one.tried] * 2.0 for one in strata])

    assert found.expected == pytest.approx(2.0 * sizes.sum())
    assert found.low == pytest.approx(found.high)


def test_eight_of_ten_intervals_hold_the_truth_and_the_mean_is_not_biased():
    sizes, costs = population(0)
    held, off = [], []
    for seed in range(300):
        strata = strata_of(sizes, 8, 64, seed)
        found = total(strata, [costs[one.tried] for one in strata])
        held.append(found.holds(costs.sum()))
        off.append(found.expected / costs.sum() - 1)

    assert 0.72 <= np.mean(held) <= 0.9
    assert abs(np.mean(off)) < 0.02


def test_strata_make_the_interval_narrower_than_one_sample_of_all():
    sizes, costs = population(1)

    def width(strata: int) -> float:
        made = strata_of(sizes, strata, 64)
        found = total(made, [costs[one.tried] for one in made])
        return found.high / found.low

    assert width(8) < width(1)


def test_a_spread_widens_the_interval_evenly():
    strata = strata_of(np.ones(10, int), 1, 10)
    found = total(strata, [np.full(10, 3.0)], spread=0.1)

    assert found.low < 30 < found.high
    assert found.low * found.high == pytest.approx(30**2)


def test_what_costs_nothing_costs_nothing():
    strata = strata_of(np.ones(10, int), 1, 10)
    assert total(strata, [np.zeros(10)]) == Range(0.0, 0.0, 0.0)
