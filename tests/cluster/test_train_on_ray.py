"""A training shared by the workers of two nodes, and rounds of retraining on a cluster."""

from __future__ import annotations

import io
import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.storage import open_store
from tests import learning, runs

pytestmark = pytest.mark.timeout(300)


def trained(*words: object, job: str = "train", **named) -> str:
    with runs.command([*map(str, words)], job=job, **named) as driver:
        code = driver.ended(240)
        assert code == 0, driver.out + driver.err
    return driver.out


def losses(store) -> np.ndarray:
    (path,) = [f.path for f in store.list("trainings") if f.path.endswith("history.parquet")]
    table = pq.read_table(io.BytesIO(store.read(path)))
    assert table["step"].to_pylist() == list(range(1, table.num_rows + 1))
    return np.array(table["loss"])


def test_two_workers_on_two_nodes_and_a_bucket_learn_what_one_process_learns(
    ray_two_nodes, s3_server, bucket, tmp_path
):
    data = learning.folder(tmp_path / "data", 24)
    words = [data, *learning.WORDS, "--set", "frozen_statistics=true", "--name", "blobs"]
    trained(*words, "--out", tmp_path / "alone")
    there = f"s3://{bucket}/registry"
    on_ray = ("--on", ray_two_nodes.address, "--workers", 2, "--compute.workers", 1)
    trained(*words, "--out", there, *on_ray)

    alone = losses(open_store(str(tmp_path / "alone")))
    shared = losses(open_store(there))

    assert len(alone) == learning.STEPS
    np.testing.assert_allclose(shared, alone, rtol=2e-4)
    assert "made before" in trained(*words, "--out", there, *on_ray)


def test_rounds_promote_refuse_and_survive_a_kill_while_the_labels_grow(ray_two_nodes, tmp_path):
    data = learning.folder(tmp_path / "data", 30)
    registry = tmp_path / "registry"
    words = [
        *(data, "--out", registry, "--name", "blobs", "--model", learning.MODEL),
        *(*learning.RECIPE, "--share", 0.4, "--rules.images", 5, "--rules.resamples", 200),
        *("--log", "json", "--compute.workers", 1),  # every further one imports torch
    ]
    on_ray = ("--on", ray_two_nodes.address, "--workers", 2)

    def round_of(*place: object) -> dict:
        return json.loads(trained(*words, *place, job="retrain").splitlines()[-1])

    first = round_of()  # the place may change from round to round
    learning.add(data, range(30, 42), shuffled=True)
    second = round_of(*on_ray)
    learning.add(data, range(42, 60))
    with runs.command([*map(str, words), *map(str, on_ray)], job="retrain") as driver:
        before = set(checkpoints(registry))
        runs.until(lambda: set(checkpoints(registry)) - before or driver.poll() is not None, "one")
        assert driver.poll() is None, driver.out + driver.err
        driver.send_signal(signal.SIGKILL)
    third = round_of(*on_ray)

    assert first["verdict"] == "promote"
    assert second["verdict"] in ("refuse", "undecided")
    assert second["champion"] == first["candidate"]
    assert third["fresh"]
    assert third["champion"] == first["candidate"]
    assert third["new"] == 30
    records = sorted((registry / "retrainings").glob("*/record.md"))
    assert len(records) == 3
    calls = {path.parent.parent.name for path in checkpoints(registry, third)}
    assert len(calls) == 2, "the killed driver's checkpoints were not gone on from"


def checkpoints(registry, record=None):
    version = "*" if record is None else training_of(registry, record)
    return (registry / "trainings").glob(f"{version}/call-*/*/state.json")


def training_of(registry, record) -> str:
    return json.loads((registry / record["candidate"] / "version.json").read_text())["training"]
