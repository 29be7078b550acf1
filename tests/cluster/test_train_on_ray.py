"""A training that the workers of two nodes share."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.storage import open_store
from tests import learning, runs

pytestmark = pytest.mark.timeout(300)


def trained(*words: object) -> str:
    with runs.command([*map(str, words)], job="train") as driver:
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
