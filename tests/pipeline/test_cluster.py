"""Ray at the edge, as far as it can be tried without a cluster; tests/cluster/ has the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.cluster import GROW_AT, OnRay, _gpu_share, _guard
from pipeline.config import Compute
from pipeline.errors import RunRefused
from pipeline.run import in_flight


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_MODE")
    before = os.umask(0)  # as careless as can be
    yield tmp_path
    os.umask(before)


def test_the_token_of_our_own_cluster_is_for_its_owner_alone(home):
    _guard()

    token = home / ".ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]

    written = token.read_text()
    token.chmod(0o644)  # as Ray leaves it
    _guard()
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == written


def test_a_cluster_of_ours_without_a_token_is_refused(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    with pytest.raises(RunRefused, match="everyone on this machine could run code as you"):
        OnRay("local", Compute()).connect()
    assert not (home / ".ray").exists()


def test_a_home_that_cannot_be_written_is_refused(home):
    (home / ".ray").touch()

    with pytest.raises(RunRefused, match=r"--on local: .*File exists"):
        OnRay("local", Compute()).connect()


@pytest.mark.parametrize(
    ("gpus", "actors", "share"),
    [([1.0], 1, 1), ([2.0, 1.0], 3, 1), ([1.0], 4, 0.25), ([2.0], 3, 0.5), ([1.0, 1.0], 5, 1 / 3)],
)
def test_more_workers_than_gpus_share_them_and_all_find_a_place(gpus, actors, share):
    nodes = [{"CPU": 8.0, "GPU": count} for count in gpus] + [{"CPU": 4.0}]

    assert _gpu_share(nodes, actors) == pytest.approx(share)
    assert sum(int(count / share) for count in gpus) >= actors


class Growing(OnRay):
    """One node of four cores so far, of a cluster to which others may come."""

    _grows, gpus = True, 0

    @staticmethod
    def alive():
        return [{"CPU": 4.0, "GPU": 1.0}]


class GrowingGpus(Growing):
    """The same, and they are wanted for their GPUs."""

    gpus = 1


@pytest.mark.parametrize(
    ("place", "turns", "holds"),
    [(Growing, 1, {"num_cpus": 1}), (GrowingGpus, 4, {"num_cpus": 0.5, "num_gpus": 1})],
)
def test_a_cluster_is_asked_for_more_workers_while_those_it_has_are_busy(place, turns, holds):
    """Ray counts calls that are with a worker by those that it does at once."""
    asked = place("auto", Compute())._actors(1000)
    pool = asked.pop("compute")

    assert (pool.min_size, pool.max_size) == (1, 1000)
    assert pool.max_tasks_in_flight_per_actor / in_flight(turns) > GROW_AT
    assert asked == holds
