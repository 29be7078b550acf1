"""A training that the workers of two nodes share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import EXIT_DONE, EXIT_REFUSED
from pipeline.storage import open_store
from tests import learning, runs

pytestmark = pytest.mark.timeout(300)


def trained(*words: object, code: int = EXIT_DONE) -> runs.Command:
    with runs.command([*map(str, words)], job="train") as driver:
        assert driver.ended(240) == code, driver.out + driver.err
    return driver


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
    assert "made before" in trained(*words, "--out", there, *on_ray).out


def test_workers_share_a_classifier_too(ray_two_nodes, tmp_path):
    data = learning.class_folders(tmp_path / "data", 24)
    words = [data, *learning.CLASSIFIES, "--name", "light"]
    trained(*words, "--out", tmp_path / "alone")
    on_ray = ("--on", ray_two_nodes.address, "--workers", 2, "--compute.workers", 1)
    trained(*words, "--out", tmp_path / "shared", *on_ray)

    alone, shared = (losses(open_store(str(tmp_path / name))) for name in ("alone", "shared"))

    np.testing.assert_allclose(shared, alone, rtol=2e-4)


def test_a_loss_that_is_no_number_ends_it_on_a_cluster_too(ray_two_nodes, tmp_path):
    data = learning.folder(tmp_path / "data", 12)
    diverging = ("--set", "rate.peak=1e3", "--set", "rate.warmup=12", "--every", "1")
    words = [data, *learning.WORDS, *diverging, "--name", "blobs", "--out", tmp_path / "r"]

    told = trained(*words, "--on", ray_two_nodes.address, code=EXIT_REFUSED)

    assert "refused: step " in told.err
    assert Path(told.err.strip().rpartition("; that state is ")[2]).is_dir()
    assert not (tmp_path / "r" / "blobs").exists()
