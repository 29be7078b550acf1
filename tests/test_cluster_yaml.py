"""The example cluster is one that Ray accepts, and one that is safe to start."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from pipeline.cluster import KEEP_WORKERS

PATH = Path(__file__).parents[1] / "cluster.yaml"
CLUSTER = yaml.safe_load(PATH.read_text())
NODE_TYPES = CLUSTER["available_node_types"]
STARTS = {
    "head": " ".join(CLUSTER["head_start_ray_commands"]),
    "worker": " ".join(CLUSTER["worker_start_ray_commands"]),
}


def flags_of(node: str) -> dict[str, object]:
    """Parse the `ray start` of a node as Ray itself would."""
    words = shlex.split(STARTS[node].rpartition("ray start ")[2])
    return start.make_context("start", words).params


def test_ray_accepts_it_with_its_own_schema_and_defaults():
    validate_config(prepare_config(CLUSTER))


def test_the_head_does_no_work():
    assert NODE_TYPES[CLUSTER["head_node_type"]]["resources"] == {"CPU": 0}
    assert flags_of("head")["num_cpus"] == 0


def test_the_dashboard_is_reached_through_a_tunnel_only():
    assert flags_of("head")["dashboard_host"] == "127.0.0.1"


@pytest.mark.parametrize("node", STARTS)
def test_every_node_asks_for_the_token_and_finds_it_in_a_private_file(node):
    before_ray = STARTS[node].rpartition("ray start ")[0]
    assert "RAY_AUTH_MODE=token" in before_ray
    (token,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+?);?\s", before_ray)
    assert token in CLUSTER["file_mounts"]
    assert any(f"chmod 600 {token}" in command for command in CLUSTER["setup_commands"])


def test_the_token_lies_outside_the_repository():
    assert CLUSTER["file_mounts"]["/home/ray/.ray/auth_token"].startswith("~/")


def test_it_holds_no_credentials_and_every_node_has_a_role():
    assert not re.search(
        r"AKIA|ASIA|secret_?key|access_?key|password|[0-9a-f]{32}", PATH.read_text()
    )
    assert all("IamInstanceProfile" in kind["node_config"] for kind in NODE_TYPES.values())


def test_no_gpu_runs_without_a_job_and_all_are_on_spot():
    gpus = [kind for kind in NODE_TYPES.values() if kind.get("labels") == {"pool": "gpu"}]
    assert [kind["min_workers"] for kind in gpus] == [0]
    assert gpus[0]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_workers_get_a_tuned_allocator_and_one_thread_each():
    exported = STARTS["worker"].rpartition("ray start ")[0]
    for setting in (
        "MALLOC_MMAP_MAX_=0",
        "MALLOC_TRIM_THRESHOLD_=2000000000",
        "MALLOC_TOP_PAD_=67108864",
        "OMP_NUM_THREADS=1",
    ):
        assert setting in exported


def test_workers_outlive_the_pause_between_two_fragments():
    assert flags_of("head")["system_config"] == KEEP_WORKERS


def test_all_nodes_run_the_ray_that_the_project_pins():
    pinned = re.search(
        r"ray\[data,default\]==(\d+\.\d+)\.\*", (PATH.parent / "pyproject.toml").read_text()
    )
    images = re.findall(r"rayproject/ray:(\d+\.\d+)\.\d+-py311", PATH.read_text())
    assert set(images) == {pinned[1]}
