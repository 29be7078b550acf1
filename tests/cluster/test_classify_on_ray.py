"""A classifier on two nodes: the run is the one that a single process makes."""

from __future__ import annotations

import pytest

from tests import runs

pytestmark = pytest.mark.timeout(180)


def test_a_classifying_run_on_two_nodes_equals_that_of_one_process(
    ray_two_nodes, archive, tiny_classifier, tmp_path
):
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    runs.finished(runs.words(archive, alone, tiny_classifier), tmp_path / "log")
    expected = runs.content(alone)
    assert len(expected["predictions"]) == 60
    assert len({row["label"] for row in expected["predictions"]}) == 3

    runs.on_ray(runs.words(archive, spread, tiny_classifier), ray_two_nodes.address)

    runs.assert_same(spread, expected)
    assert runs.this_call(spread)["adopted"] == 0
