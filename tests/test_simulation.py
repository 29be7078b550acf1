"""benchmarks/simulation: what is scarce sets the rate; nothing is lost, nothing committed twice."""

import dataclasses
import math
from dataclasses import replace

import pytest

from benchmarks.simulation.__main__ import described, parser
from benchmarks.simulation.description import RESOURCES, Cluster, Work, doubled
from benchmarks.simulation.fleet import simulated

WORK = Work(pictures=64 * 2000, fragment_pictures=64)
AMPLE = Cluster(
    gpus=16,
    gpu_rate=15_000,
    cores=512,
    network=250e9,
    latency_seconds=0.002,
    source_prefixes=100,
    run_prefixes=10,
    driver_seconds=0.0001,
    losses=0,
)
MEAN = math.exp(Cluster().latency_tail ** 2 / 2)
"""Of the latency, in medians of it."""
PICTURE = WORK.decode_seconds + WORK.encode_seconds

SCARCE = {
    "GPUs": (replace(AMPLE, gpu_rate=300), 16 * 300),
    "cores": (replace(AMPLE, cores=4), 2 * 4 / PICTURE),
    "network": (replace(AMPLE, network=1e9), 2 * 1e9 / 8 / WORK.encoded_bytes),
    "S3 GET": (replace(AMPLE, source_prefixes=1), 5500),
    "S3 PUT": (replace(AMPLE, run_prefixes=1, put_rate=200), 200 / 2 * 64),
    "driver": (replace(AMPLE, driver_seconds=0.01), 64 / 0.01),
    # One request at a time: the last of many would find the others idle.
    "requests in flight": (
        replace(AMPLE, requests=1, latency_seconds=0.05),
        2 * 64 / (0.05 * MEAN),
    ),
    "fragments in flight": (
        replace(AMPLE, fragments_in_flight=1),
        16 / (0.002 * MEAN / 64 + WORK.decode_seconds / 2 + 1 / 15_000 + WORK.encode_seconds),
    ),
}
"""A cluster short of one thing, and the pictures a second that this allows."""


def test_everything_that_may_be_in_the_way_is_tried():
    assert set(SCARCE) == set(RESOURCES)


@pytest.mark.parametrize("resource", SCARCE)
def test_the_scarce_resource_sets_the_rate(resource):
    cluster, capacity = SCARCE[resource]

    outcome = simulated(WORK, cluster)

    assert outcome.steady == pytest.approx(capacity, rel=0.03)
    assert outcome.bottleneck == resource
    assert max(outcome.used.values()) <= 1


@pytest.mark.parametrize("resource", SCARCE)
def test_twice_of_it_is_faster_and_twice_of_another_is_not(resource):
    cluster = SCARCE[resource][0]
    base = simulated(WORK, cluster).steady

    # Twice the GPUs have twice the fragments in flight.
    names = RESOURCES if resource != "fragments in flight" else set(RESOURCES) - {"GPUs"}
    gains = {name: simulated(WORK, doubled(cluster, name)).steady / base for name in names}

    assert gains.pop(resource) > 1.5
    assert all(gain < 1.02 for gain in gains.values()), gains


@pytest.mark.parametrize("resource", ["GPUs", "S3 GET", "driver"])
def test_lost_nodes_cost_time_and_no_fragment(resource):
    calm = replace(SCARCE[resource][0], detection_seconds=1, replacement_seconds=3)

    outcomes = [simulated(WORK, replace(calm, losses=losses)) for losses in (0, 600)]

    for outcome in outcomes:
        assert outcome.commits == bytes([1]) * WORK.fragments
    undisturbed, disturbed = outcomes
    assert undisturbed.losses == undisturbed.begun_again == undisturbed.adopted == 0
    assert disturbed.losses > 0
    assert disturbed.begun_again > 0
    assert disturbed.seconds > undisturbed.seconds


def test_what_was_committed_before_its_node_was_lost_is_adopted():
    cluster = replace(SCARCE["driver"][0], losses=600, detection_seconds=1, replacement_seconds=3)

    outcome = simulated(WORK, cluster)

    assert outcome.adopted > 0
    assert set(outcome.commits) == {1}


def test_the_same_seed_makes_the_same():
    cluster = replace(AMPLE, losses=600, detection_seconds=1, replacement_seconds=3)

    assert simulated(WORK, cluster, 1) == simulated(WORK, cluster, 1)
    assert simulated(WORK, cluster, 1) != simulated(WORK, cluster, 2)


def test_the_last_fragment_may_be_smaller():
    work = replace(WORK, pictures=64 * 3 + 5)

    assert [work.size(fragment) for fragment in range(work.fragments)] == [64, 64, 64, 5]
    assert len(simulated(work, AMPLE).commits) == 4


def test_gpus_fill_whole_nodes():
    with pytest.raises(ValueError, match="whole nodes"):
        Cluster(gpus=12)


def test_every_figure_is_a_flag_and_says_whence_it_comes():
    assert described(Work, parser().parse_args([])) == Work()
    assert described(Cluster, parser().parse_args(["--gpus", "8"])) == Cluster(gpus=8)
    for kind in (Work, Cluster):
        assert all(field.metadata["origin"] for field in dataclasses.fields(kind))
    assert "no GPU to measure" in " ".join(parser().format_help().split())
