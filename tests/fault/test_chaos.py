"""Faults at seeded moments: whatever a seed does, the run is the one that nothing happened to.

A seed decides what happens and when. Some run with every change, more of them at night
(`MASKFLEET_SEEDS=20`, .ci/nightly); the seed of a failure stands in the name of the test.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from pipeline.errors import EXIT_REJECTIONS, EXIT_UNFINISHED
from tests import runs
from tests.conftest import RayNodes, two_ray_nodes
from tests.poisons import everywhere, waver

SEEDS = int(os.environ.get("MASKFLEET_SEEDS", "0"))
IN_FLIGHT = 4  # fragments, of a process with two workers (run.run_here)
IN_FLIGHT_ON_RAY = {0: 8, 1: 14}  # by GPUs of a node: four actors with two, or two with seven
RECOVERY_S = 240.0


def seeds(with_every_change: int) -> range:
    return range(SEEDS or with_every_change)


# -- drivers -------------------------------------------------------------------------------------


@dataclass
class Drivers:
    """Drivers of one run, some of which suffer something."""

    words: list[str]
    folder: Path
    stack: ExitStack
    environment: dict[str, str] | None = None
    faults: int = 0
    doubled: bool = False
    """Two were at it at the same time: by design nothing keeps them from doing the same work."""
    frozen: list[runs.Driver] = field(default_factory=list)

    def started(self) -> runs.Driver:
        number = len(list(self.folder.glob("log-*")))
        before = (waver,) if self.environment else ()
        made = runs.driver(self.words, self.folder / f"log-{number}", self.environment, *before)
        return self.stack.enter_context(made)

    def suffer(self, dice: random.Random) -> None:
        """Start one, let it work, and do something to it."""
        driver = self.started()
        time.sleep(dice.uniform(0.2, 2.5))
        if not driver.alive:
            assert driver.wait() == EXIT_REJECTIONS, driver.said
            return
        self.faults += 1
        deed = dice.choice((self.kill, self.stop, self.freeze, self.double))
        deed(driver)

    def kill(self, driver: runs.Driver) -> None:
        with suppress(ProcessLookupError):
            driver.signal(signal.SIGKILL)
        assert driver.wait() in {-signal.SIGKILL, EXIT_REJECTIONS}, driver.said

    def stop(self, driver: runs.Driver) -> None:
        driver.signal(signal.SIGTERM)
        assert driver.wait() in {EXIT_UNFINISHED, EXIT_REJECTIONS}, driver.said

    def freeze(self, driver: runs.Driver) -> None:
        """It wakes up when others have done its work."""
        driver.signal(signal.SIGSTOP)
        self.frozen.append(driver)

    def double(self, driver: runs.Driver) -> None:
        self.doubled = True
        other = self.started()
        assert {driver.wait(120), other.wait(120)} == {EXIT_REJECTIONS}, driver.said + other.said

    def wake(self) -> None:
        for driver in self.frozen:
            driver.signal(signal.SIGCONT)
            assert driver.wait(120) in {EXIT_UNFINISHED, EXIT_REJECTIONS}, driver.said


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", seeds(2))
def test_whatever_happens_to_its_drivers_a_run_ends_as_it_would_have(
    long_archive, tiny_bundle, long_oracle, tmp_path, seed
):
    run, dice = tmp_path / "run", random.Random(seed)
    with ExitStack() as stack:
        drivers = Drivers(runs.words(long_archive, run, tiny_bundle), tmp_path, stack)
        for _ in range(dice.randint(2, 3)):
            drivers.suffer(dice)
        last = drivers.started()
        assert last.wait(240) == EXIT_REJECTIONS, last.said
        made = runs.commits(run)
        drivers.wake()
    assert runs.commits(run) == made, "a committed fragment was replaced"
    runs.assert_same(run, long_oracle)
    if not drivers.doubled:
        assert runs.rework(run) <= drivers.faults * IN_FLIGHT


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", seeds(1))
def test_attempts_are_never_mixed_even_if_no_two_give_the_same_answer(
    archive, tiny_bundle, tmp_path, seed
):
    """A model that answers otherwise each time: rows of one attempt and pixels of another would
    contradict each other."""
    run, dice = tmp_path / "run", random.Random(1000 + seed)
    environment = everywhere(tmp_path / "start", waver)
    with ExitStack() as stack:
        words = runs.words(archive, run, tiny_bundle)
        drivers = Drivers(words, tmp_path, stack, environment)
        for _ in range(2):
            drivers.suffer(dice)
        last = drivers.started()
        assert last.wait(240) == EXIT_REJECTIONS, last.said
        made = runs.content(run)
        drivers.wake()
    runs.assert_sound(run)
    assert runs.content(run) == made, "what was final has changed"
    other = tmp_path / "other"
    with runs.driver(
        runs.words(archive, other, tiny_bundle), tmp_path / "log", environment, waver
    ) as driver:
        assert driver.wait() == EXIT_REJECTIONS
    assert runs.content(other)["masks"] != made["masks"], "it does not waver: this shows nothing"


# -- a cluster -----------------------------------------------------------------------------------


@dataclass
class Cluster:
    """Two nodes to be damaged, by a seed."""

    nodes: RayNodes
    dice: random.Random
    faults: int = 0
    whole: bool = True
    """No node was lost so far."""
    frozen: list[tuple[psutil.Process, float]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def suffer(self) -> None:
        deeds = [self.actor, self.actor, self.freeze, self.late_node]
        if runs.tasks(*self.nodes.raylets):
            deeds += [self.task]
        if self.whole:
            deeds += [self.node, self.raylet]
        deed = self.dice.choice(deeds)
        self.done.append(deed.__name__)
        self.faults += 1
        deed()

    def actor(self) -> None:
        self._hit(runs.actors(*self.nodes.raylets), signal.SIGKILL)

    def task(self) -> None:
        self._hit(runs.tasks(*self.nodes.raylets), signal.SIGKILL)

    def freeze(self) -> None:
        """An actor sleeps for a while, and wakes up as if nothing had happened."""
        until = time.monotonic() + self.dice.uniform(3, 12)
        self.frozen += [(one, until) for one in self._hit(self._actors(), signal.SIGSTOP)]

    def node(self) -> None:
        self.whole = False
        self.nodes.kill(1)

    def raylet(self) -> None:
        """Its workers learn from a closed socket that they are orphans."""
        self.whole = False
        self._hit([psutil.Process(self.nodes.raylets[1])], signal.SIGKILL)

    def late_node(self) -> None:
        self.faults -= 1  # which costs nothing
        self.nodes.cluster.add_node(num_cpus=1, object_store_memory=100 * 1024**2)

    def thaw(self, *, now: bool = False) -> None:
        late = [one for one in self.frozen if now or one[1] < time.monotonic()]
        self.frozen = [one for one in self.frozen if one not in late]
        for process, _ in late:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    def watch(self, run: Path, driver: runs.Command, commits: float = float("inf")) -> None:
        """Return at so many commits, or when the driver has ended; wake who has slept enough."""

        def there() -> bool:
            self.thaw()
            return runs.committed(run) >= commits or driver.poll() is not None

        runs.until(there, f"{commits} commits after {self.done}", RECOVERY_S, 0.05)

    def _actors(self) -> list[psutil.Process]:
        return runs.actors(*self.nodes.raylets)

    def _hit(self, processes: list[psutil.Process], number: int) -> list[psutil.Process]:
        chosen = [self.dice.choice(processes)] if processes else []
        for process in chosen:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return chosen


@contextmanager
def damaged(seed: int, gpus: int) -> Iterator[Cluster]:
    with two_ray_nodes({}, gpus) as nodes:
        cluster = Cluster(nodes, random.Random(seed))
        try:
            yield cluster
        finally:
            cluster.thaw(now=True)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("seed", seeds(1))
def test_whatever_happens_to_a_cluster_a_run_on_it_ends_as_it_would_have(
    long_archive, tiny_bundle, long_oracle, tmp_path, seed, gpus
):
    run = tmp_path / "run"
    with damaged(seed, gpus) as cluster:
        words = runs.words(long_archive, run, tiny_bundle, "--on", cluster.nodes.address)
        with runs.command(words) as driver:
            for commits in sorted(cluster.dice.sample(range(1, 16), 3)):
                cluster.watch(run, driver, commits)
                if driver.poll() is None:
                    cluster.suffer()
            cluster.watch(run, driver)
            assert driver.ended() == EXIT_REJECTIONS, f"{cluster.done}\n{driver.out}{driver.err}"
    runs.assert_same(run, long_oracle)
    assert runs.rework(run) <= cluster.faults * IN_FLIGHT_ON_RAY[gpus], cluster.done


@pytest.mark.timeout(400)
def test_without_any_worker_node_a_run_waits_for_one_that_comes(
    long_archive, tiny_bundle, long_oracle, tmp_path
):
    run = tmp_path / "run"
    with two_ray_nodes({}) as nodes:
        words = runs.words(long_archive, run, tiny_bundle, "--on", nodes.address)
        with runs.command(words) as driver:
            runs.until(lambda: runs.committed(run) >= 2 or driver.poll() is not None, "two commits")
            orphans = runs.actors(*nodes.raylets)
            for worker in range(2):
                nodes.kill(worker)
            _, alive = psutil.wait_procs(orphans, 20)  # until they notice they may still commit
            assert not alive, "actors outlive their nodes"
            before = runs.commits(run)
            assert len(before) < len(long_oracle["fragments"]), "too late to matter"
            time.sleep(20)  # Ray has noticed after 15
            assert driver.poll() is None, driver.out + driver.err
            assert runs.commits(run) == before
            nodes.cluster.add_node(num_cpus=2, object_store_memory=100 * 1024**2)
            assert driver.ended(RECOVERY_S) == EXIT_REJECTIONS, driver.out + driver.err
    assert before.items() <= runs.commits(run).items()
    runs.assert_same(run, long_oracle)
    assert runs.rework(run) <= IN_FLIGHT_ON_RAY[0]


@pytest.mark.timeout(300)
def test_without_its_head_a_run_ends_and_goes_on_elsewhere(
    long_archive, tiny_bundle, long_oracle, tmp_path
):
    run = tmp_path / "run"
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # 60 unless told
    words = runs.words(long_archive, run, tiny_bundle)
    with two_ray_nodes(patience) as nodes:
        on_ray = [*words, "--on", nodes.address]
        with runs.command(on_ray, environment=patience) as driver:
            runs.until(lambda: runs.committed(run) >= 2 or driver.poll() is not None, "two commits")
            nodes.cluster.head_node.kill_gcs_server(check_alive=False)
            assert driver.ended(90) == EXIT_UNFINISHED, driver.out + driver.err
    assert "run the same command again" in driver.err
    before = runs.commits(run)

    runs.finished(words, tmp_path / "log")
    assert before.items() <= runs.commits(run).items()
    runs.assert_same(run, long_oracle)


LOST = {"num_failures": 20, "req_failure_prob": 20, "resp_failure_prob": 20}
CALLS = (
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "CoreWorkerService.grpc_client.PushTask",
    "NodeManagerService.grpc_client.ReturnWorkerLease",
)


@pytest.mark.skipif(not SEEDS, reason="at night: a minute, and Ray's own affair (.ci/nightly)")
@pytest.mark.timeout(300)
def test_calls_between_rays_processes_get_lost_and_nothing_is(
    long_archive, tiny_bundle, long_oracle, tmp_path
):
    run = tmp_path / "run"
    losing = {"RAY_testing_rpc_failure": json.dumps(dict.fromkeys(CALLS, LOST))}
    with two_ray_nodes(losing) as nodes:
        words = runs.words(long_archive, run, tiny_bundle, "--on", nodes.address)
        with runs.command(words, environment=losing) as driver:
            assert driver.ended(RECOVERY_S) == EXIT_REJECTIONS, driver.out + driver.err
    runs.assert_same(run, long_oracle)
