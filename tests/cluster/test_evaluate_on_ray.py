"""A model measured on two nodes: the figures are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from tests.bundles import BUDGET
from tests.labelled import folder_pair, pairs

pytestmark = pytest.mark.timeout(180)


def ran(*words: object) -> subprocess.CompletedProcess[str]:
    """A driver of its own: Ray is told where by an address, never found."""
    command = [sys.executable, "-m", "jobs.evaluate", *map(str, words)]
    budget = ["--batch.pixels", str(BUDGET)]
    return subprocess.run([*command, *budget], capture_output=True, text=True, check=False)


def measured(out, *words: object) -> dict:
    done = ran(*words, "--json", "--out", out)
    assert done.returncode == 3, done.stderr
    return json.loads(done.stdout)


def test_a_model_measured_on_two_nodes_has_the_figures_of_one_process(
    ray_two_nodes, tiny_bundle, tmp_path
):
    one = pairs()
    both = {f"{n}/{key}": pair for n in range(12) for key, pair in one.items()}
    image, mask = one["a.jpg"]
    folder = folder_pair(tmp_path / "data", {**both, "bad.jpg": (image[:300], mask)})

    here = measured(tmp_path / "here", tiny_bundle, folder)
    there = measured(tmp_path / "there", tiny_bundle, folder, "--on", ray_two_nodes.address)

    assert here["images"] == 48
    assert there["about"]["on"] == ray_two_nodes.address
    timed = {name for name in here if "seconds" in name} | {"about"}
    assert {k: v for k, v in here.items() if k not in timed} == {
        k: v for k, v in there.items() if k not in timed
    }
    tables = [
        pq.read_table(tmp_path / place / "evaluation.parquet").drop_columns("seconds")
        for place in ("here", "there")
    ]
    assert tables[0].equals(tables[1])


def test_what_only_a_worker_finds_out_is_refused_all_the_same(ray_two_nodes, tiny_bundle, tmp_path):
    folder = folder_pair(tmp_path)

    done = ran(tiny_bundle, folder, "--tile.size", "16", "--on", ray_two_nodes.address)

    assert done.returncode == 2, done.stderr
    assert "refused: --tile.size 16 is below" in done.stderr
    assert "Traceback" not in done.stderr
