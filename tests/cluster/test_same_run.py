"""However many nodes: the run is the one that a single process makes."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.errors import EXIT_REFUSED, EXIT_UNFINISHED
from tests import objects, runs

pytestmark = pytest.mark.timeout(180)
RAYS_OWN = re.compile(r"ray|raylet|gcs|WARNING|DEBUG|\d{4}-\d\d-\d\d", re.IGNORECASE)


def test_actors_on_two_nodes_make_the_run_that_one_process_makes(
    ray_two_nodes, archive, tiny_bundle, oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(archive, run, tiny_bundle, "--compute.workers", "4")
    with runs.command([*words, "--on", ray_two_nodes.address]) as driver:
        runs.until(
            lambda: all(runs.actors(raylet) for raylet in ray_two_nodes.raylets),
            "an actor on each node",
        )
        assert driver.ended() == 3, driver.err

    runs.assert_same(run, oracle)
    rejected = {row["key"]: row["reason"] for row in runs.content(run)["rejected"]}
    assert rejected == objects.BAD
    assert runs.this_call(run)["adopted"] == 0


def test_beside_gpus_tasks_fetch_for_the_actors_and_the_run_is_the_same(
    ray_gpu_nodes, archive, tiny_bundle, oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(archive, run, tiny_bundle, "--on", ray_gpu_nodes.address)
    with runs.command(words) as driver:
        raylets = ray_gpu_nodes.raylets
        runs.until(lambda: runs.tasks(*raylets) or driver.poll() is not None, "a task that fetches")
        assert driver.poll() is None, driver.ended() and driver.out + driver.err
        assert driver.ended() == 3, driver.err
    runs.assert_same(run, oracle)
    assert runs.this_call(run)["adopted"] == 0


def test_two_nodes_make_the_same_run_in_a_bucket(
    ray_two_nodes, bucket, s3_server, archive, tiny_bundle, oracle
):
    with s3_server.client() as s3:
        source = objects.into_bucket(objects.mixed(), s3, bucket, "in")
    run = f"s3://{bucket}/out/run"

    runs.on_ray(runs.words(source, run, tiny_bundle), ray_two_nodes.address)
    runs.assert_same(run, oracle, without=("uri", "etag"))
    # the nodes have the keys in their environment, and tell nobody
    session = Path(ray_two_nodes.cluster.head_node.get_session_dir_path())
    logs = {path: path.read_bytes() for path in session.rglob("*") if path.is_file()}
    assert len(logs) > 10
    canaries = s3_server.owner.disguises()
    assert not [path for path, text in logs.items() if any(word in text for word in canaries)]


@pytest.mark.parametrize("first", ["process", "cluster"])
def test_a_run_begun_in_one_place_is_finished_in_the_other(
    ray_two_nodes, archive, tiny_bundle, oracle, tmp_path, first
):
    run = tmp_path / "run"
    words = runs.words(archive, run, tiny_bundle)
    if first == "process":
        with runs.driver(words, tmp_path / "log") as driver:
            runs.until(lambda: runs.committed(run) >= 3, "three commits")
            driver.kill()
        before = runs.commits(run)
        runs.on_ray(words, ray_two_nodes.address)
    else:
        with runs.command([*words, "--on", ray_two_nodes.address]) as driver:
            runs.until(lambda: runs.committed(run) >= 3, "three commits")
            driver.kill()
            driver.ended()
        # the job's tasks die with it, but not in the same instant
        runs.until(lambda: not runs.actors(*ray_two_nodes.raylets), "its actors to end")
        before = runs.commits(run)
        runs.finished(words, tmp_path / "log")

    runs.assert_went_on(run, before, oracle)


def test_a_folder_that_one_node_does_not_see_is_refused(
    ray_two_nodes, archive, tiny_bundle, tmp_path
):
    # every process has a working directory of its own, and so a run folder of its own
    words = runs.words(archive, "/proc/self/cwd/run", tiny_bundle, "--on", ray_two_nodes.address)
    with runs.command(words, cwd=tmp_path) as driver:
        assert driver.ended() == EXIT_REFUSED, driver.out + driver.err
    assert "does not see this run at /proc/self/cwd/run" in driver.err
    assert "use a shared folder or s3://" in driver.err
    assert not runs.commits(tmp_path / "run")


def frozen(raylets: list[int]) -> bool:
    """Freeze every actor that there is by now; Ray kills them in the end, frozen or not."""
    for actor in runs.actors(*raylets):
        with suppress(psutil.NoSuchProcess):
            actor.suspend()
    return True


def test_a_run_without_progress_stops_and_can_go_on(
    ray_two_nodes, archive, tiny_bundle, oracle, tmp_path
):
    run = tmp_path / "run"
    words = runs.words(archive, run, tiny_bundle)
    watched = [*words, "--on", ray_two_nodes.address, "--compute.no-progress-s", "10"]
    with runs.command(watched) as driver:
        runs.until(lambda: frozen(ray_two_nodes.raylets) and driver.poll() is not None, "its end")
        assert driver.ended() == EXIT_UNFINISHED, driver.out + driver.err
    assert "run the same command again" in driver.err

    runs.finished(words, tmp_path / "log")
    runs.assert_same(run, oracle)


def test_a_cluster_whose_token_is_another_refuses_without_a_trace(
    ray_two_nodes, archive, tiny_bundle, tmp_path
):
    other = tmp_path / "token"
    other.touch(mode=0o600)
    other.write_text("0" * 64)
    words = runs.words(archive, tmp_path / "run", tiny_bundle, "--on", ray_two_nodes.address)
    with runs.command(words, environment={"RAY_AUTH_TOKEN_PATH": str(other)}) as driver:
        assert driver.ended() == EXIT_REFUSED, driver.out + driver.err
    assert "token" in driver.err
    assert "Traceback" not in driver.err
    assert not list((tmp_path / "run").rglob("*"))


def test_a_gpu_that_no_node_has_is_refused_at_once(archive, tiny_bundle, tmp_path):
    words = runs.words(archive, tmp_path / "run", tiny_bundle, "--compute.device", "cuda")
    with runs.command([*words, "--on", "local"]) as driver:
        assert driver.ended() == 2, driver.err
    assert "no node there has a GPU" in driver.err
    assert not (tmp_path / "run/run.json").exists()


def test_memory_that_runs_out_on_a_worker_is_no_bug():
    import ray.exceptions

    from pipeline.cluster import in_our_words

    numpys = np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("u1"))
    with pytest.raises(MemoryError, match="Unable to allocate"), in_our_words():
        raise ray.exceptions.RayTaskError("segment", "its trace", numpys)


def is_loopback(address: str) -> bool:
    ip = ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def test_ray_on_this_machine_makes_the_same_run_in_silence_and_on_loopback(
    archive, tiny_bundle, oracle, tmp_path
):
    run = tmp_path / "run"
    listening: set[str] = set()
    elsewhere = {"RAY_ADDRESS": "192.0.2.1:6379"}  # a cluster that has nothing to do with this
    words = [*runs.words(archive, run, tiny_bundle), "--on", "local"]
    with runs.command(words, environment=elsewhere) as driver:
        runs.until_actor(driver, driver.pid)
        for process in psutil.Process(driver.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # some end while others start
                listening |= {
                    connection.laddr.ip
                    for connection in process.net_connections("inet")
                    if connection.status == psutil.CONN_LISTEN
                }
        assert driver.ended() == 3, driver.err

    runs.assert_same(run, oracle)
    assert listening
    assert not [address for address in listening if not is_loopback(address)]
    said = [line for line in (driver.out + driver.err).splitlines() if str(run) not in line]
    assert not [line for line in said if RAYS_OWN.search(line)], driver.out + driver.err
