"""`maskfleet submit`, `jobs` and `schedule` against two Ray nodes that people start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from jobs._ray import RayJobs, working_folder
from pipeline.errors import EXIT_DONE, EXIT_REFUSED, EXIT_REJECTIONS, EXIT_UNFINISHED
from pipeline.rounds import Rounds
from pipeline.schedule import Spec
from pipeline.scheduler import Scheduler
from pipeline.storage import open_store
from pipeline.submission import OnCluster
from pipeline.timetable import Timetable
from tests import learning, runs
from tests.canaries import STORE_KEYS
from tests.s3server import free_ports
from tests.schedules import Clock

PORTS = ["port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port",
         "object-manager-port", "node-manager-port", "runtime-env-agent-port",
         "metrics-export-port"]  # fmt: skip
WAITS = ["schedule", "run"]
"""A job that lasts until it is stopped: a scheduler of nothing."""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A head that does no work and a worker, as cluster.yaml has them; its dashboard's address."""
    folders = [Path(tempfile.mkdtemp(prefix="mf-sub-")) for _ in range(2)]  # sockets: short paths
    first = free_ports(16)
    gcs, dashboard = f"127.0.0.1:{first}", f"http://127.0.0.1:{first + 1}"
    ports = [f"--{name}={first + n}" for n, name in enumerate(PORTS)]
    # the client's server and the GCS are the head's alone; an agent of its own for each node, or
    # two would unpack the same working directory into one place
    others = [f"--{name}={first + 8 + n}" for n, name in enumerate(PORTS)
              if name not in {"port", "dashboard-port", "ray-client-server-port"}]  # fmt: skip
    try:
        with (
            node(folders[0], "--head", "--num-cpus=0", "--dashboard-host=127.0.0.1", *ports),
            contextmanager(waiting)(dashboard),
            node(folders[1], f"--address={gcs}", "--num-cpus=2", *others),
        ):
            runs.until(lambda: nodes(dashboard) == 2, "the second node")
            yield dashboard
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


# A second node is refused where that switch keeps Ray on loopback (conftest.py): so it is on for
# this one moment, and what it would do to addresses is undone.
START = """
import os, sys
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
from ray._private import ray_constants, services
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
sys.exit(main())
"""


@contextmanager
def node(folder: Path, *words: str) -> Iterator[None]:
    """`ray start --block`, ended by a signal to it alone: `ray stop` ends every Ray there is."""
    # the job's `python` is the first on the head's path
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "node.log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, "-c", START, "start", "--block",
             "--node-ip-address=127.0.0.1", "--object-store-memory=150000000",
             f"--temp-dir={folder}", *words],
            env={**os.environ, "PATH": path, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


def waiting(dashboard: str) -> Iterator[None]:
    runs.until(lambda: asked(dashboard, "/api/jobs/") is not None, "the dashboard")
    yield


def asked(dashboard: str, path: str) -> object:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(dashboard + path, None, {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except (urllib.error.HTTPError, OSError):
        return None


def nodes(dashboard: str) -> int:
    found = asked(dashboard, "/nodes?view=summary")
    if not isinstance(found, dict):
        return 0
    return sum(n["raylet"].get("state") == "ALIVE" for n in found["data"]["summary"])


@pytest.fixture(scope="module")
def finished(archive, tiny_bundle, tmp_path_factory) -> str:
    """A run that is done with rejections: `status` of it exits 3."""
    folder = tmp_path_factory.mktemp("finished")
    runs.finished(runs.words(archive, folder / "run", tiny_bundle), folder / "log")
    return str(folder / "run")


def ours(job: str, *words: str, code: int, **environment: str) -> tuple[str, str]:
    """`maskfleet JOB …` to its end; what it wrote to stdout and stderr."""
    with runs.command(words, job=job, environment=environment) as called:
        assert called.ended() == code, called.out + called.err
        assert token() not in called.out + called.err
        return called.out, called.err


def token() -> str:
    return Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()


def listed(head: str) -> dict[str, dict]:
    out, _ = ours("jobs", "list", "--address", head, "--json", code=0)
    return {job["id"]: job for job in map(json.loads, out.splitlines())}


@pytest.mark.timeout(240)
def test_a_jobs_exit_code_is_the_drivers_and_its_log_is_there(head, finished):
    # where Ray's own client would rather go
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:9", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    words = ["--address", head, "status", finished]
    out, err = ours("submit", *words, code=EXIT_REJECTIONS, **elsewhere, **STORE_KEYS)
    assert "60 done, 5 rejected" in out.replace("\n", " ")
    assert "ended with exit code 3" in err
    job_id = next(word for word in err.split() if word.startswith("mf-status-"))
    job = listed(head)[job_id]
    assert (job["exit_code"], job["status"], job["metadata"]["command"]) == (3, "FAILED", "status")
    logged, _ = ours("jobs", "logs", job_id, "--address", head, code=0)
    assert logged == out
    told = json.dumps(asked(head, "/api/jobs/")) + out + err
    assert job_id in told
    assert not [secret for secret in (token(), *STORE_KEYS.values()) if secret in told]


@pytest.mark.timeout(300)
def test_the_same_job_is_found_while_it_runs_and_is_a_new_one_afterwards(head, tmp_path):
    words = ["--address", head, "--no-follow", *WAITS, str(tmp_path)]
    first, _ = ours("submit", *words, code=0)
    second, said = ours("submit", *words, code=0)
    assert first == second
    assert "runs already" in said
    job_id = first.strip()
    with runs.command([*words[:2], *words[3:]], job="submit") as following:
        runs.until(lambda: listed(head)[job_id]["status"] == "RUNNING", "the driver")
        ours("jobs", "stop", job_id[:-1], "--address", head, code=0)
        assert following.ended() == EXIT_UNFINISHED, following.err
    third, _ = ours("submit", *words, code=0)
    assert third != first
    ours("jobs", "stop", third.strip(), "--address", head, code=0)


@pytest.mark.timeout(120)
def test_a_wrong_token_is_refused(head, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    _, err = ours("jobs", "list", "--address", head, code=2, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert "does not take our token" in err
    assert "0000" not in err


def scheduled(folder: Path, **more: object) -> None:
    """A schedule of every night, the last of which was missed."""
    spec = {"cron": "0 0 * * *", "command": "status", "identity": "1d", **more}
    since = datetime.now(UTC) - timedelta(days=2)
    Timetable(open_store(str(folder))).change("nightly", 0, Spec(**spec, since=since))


def history(folder: Path, name: str = "nightly") -> list[object]:
    return [record.outcome for record in Timetable(open_store(str(folder))).history(name)]


@pytest.mark.timeout(300)
def test_racing_ticks_submit_a_scheduled_job_once(head, finished, tmp_path):
    scheduled(tmp_path, arguments=(finished,), address=head)
    words = ["tick", str(tmp_path), "--wait"]
    with (
        runs.command(words, job="schedule") as one,
        runs.command(words, job="schedule") as other,
    ):
        assert {one.ended(), other.ended()} == {0}, one.err + other.err
    ours("schedule", "tick", str(tmp_path), code=0)
    assert history(tmp_path) == [EXIT_REJECTIONS]
    mine = [job for job in listed(head).values() if job["metadata"].get("schedule") == "nightly"]
    assert [job["exit_code"] for job in mine] == [3]
    assert mine[0]["id"].startswith("mf-nightly-1d-")


@pytest.mark.timeout(300)
def test_a_scheduler_is_itself_a_job_and_its_children_run_beside_it(head, finished, tmp_path):
    scheduled(tmp_path, arguments=(finished,))
    out, _ = ours("submit", "--address", head, "schedule", "tick", str(tmp_path), "nightly", code=0)
    assert history(tmp_path) == [EXIT_REJECTIONS]
    assert "60 done, 5 rejected" in out


@pytest.mark.timeout(120)
def test_a_job_that_is_refused_says_so(head, tmp_path):
    out, _ = ours("submit", "--address", head, "status", str(tmp_path), code=EXIT_REFUSED)
    assert "holds no run" in out


# -- the whole loop ------------------------------------------------------------------------------


class Weeks:
    """A scheduler whose clock is set from one Monday to the next."""

    def __init__(self, schedules: Path) -> None:
        self._clock = Clock(datetime.now(UTC))
        self.said: list[str] = []

        def runner(address: str | None) -> OnCluster:
            return OnCluster(RayJobs(address, working_folder()))

        timetable = Timetable(open_store(str(schedules)))
        scheduler = Scheduler(timetable, runner, self.said.append, now=self._clock.now)
        self._rounds = Rounds(scheduler, self.said.append, self._pause)

    def _pause(self, seconds: float) -> bool:
        time.sleep(1.0)
        return False

    def next(self) -> None:
        """A week passes."""
        self._clock.jump(timedelta(days=7))

    def tick(self, *, wait: bool = True) -> int:
        return self._rounds.tick(["weekly"], wait=wait)


def checkpoints(registry: Path) -> set[Path]:
    return set(registry.glob("trainings/*/call-*/*/state.json"))


def driver_of(registry: Path) -> psutil.Process:
    """The command of a job: not the shell that Ray starts it with."""
    (found,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if {"jobs.retrain", str(registry)} <= set(process.info["cmdline"] or ())
    )
    return found


@pytest.mark.timeout(900)
def test_a_scheduled_retraining_promotes_refuses_and_survives_a_kill_while_the_labels_grow(
    head, tmp_path
):
    data, registry = learning.folder(tmp_path / "data", 30), tmp_path / "registry"
    when = ("--cron", "0 3 * * MON", "--retries", "1", "--retry-after-s", "0", "--address", head)
    job = [
        *("retrain", data, "--out", registry, "--name", "blobs", "--model", learning.MODEL),
        *(*learning.RECIPE, "--share", "0.4", "--rules.images", "5", "--rules.resamples", "200"),
        *("--on", "auto", "--workers", "2"),
        *("--compute.workers", "1"),  # every further one imports torch
    ]
    schedules = tmp_path / "schedules"
    ours("schedule", "add", str(schedules), "weekly", *when, "--", *map(str, job), code=0)
    weeks = Weeks(schedules)

    assert weeks.tick() == EXIT_DONE  # nothing is due before the first Monday
    assert history(schedules, "weekly") == []
    weeks.next()
    assert weeks.tick() == EXIT_DONE, weeks.said
    learning.add(data, range(30, 42), shuffled=True)
    weeks.next()
    assert weeks.tick() == EXIT_DONE, weeks.said
    learning.add(data, range(42, 60))
    weeks.next()
    before = checkpoints(registry)
    weeks.tick(wait=False)
    runs.until(lambda: checkpoints(registry) - before, "a checkpoint", 300, every=0.1)
    driver_of(registry).kill()
    assert weeks.tick() == EXIT_DONE, weeks.said

    assert history(schedules, "weekly") == [EXIT_DONE, EXIT_DONE, EXIT_UNFINISHED, EXIT_DONE]
    mine = [job for job in listed(head).values() if job["metadata"].get("schedule") == "weekly"]
    assert len(mine) == 4
    first, second, third = records(registry)
    assert first["verdict"] == "promote"
    assert second["verdict"] in ("refuse", "undecided")
    assert second["champion"] == first["candidate"]
    assert third["champion"] == first["candidate"]
    assert (second["new"], third["new"]) == (12, 30)
    steps, calls = training_of(registry, third)
    assert steps == list(range(1, learning.STEPS + 1))
    assert calls == 2, "the killed driver's checkpoints were not gone on from"


def records(registry: Path) -> list[dict]:
    """What the rounds wrote down, in order."""
    found = registry.glob("retrainings/*/record.json")
    return sorted((json.loads(path.read_text()) for path in found), key=lambda one: one["when"])


def training_of(registry: Path, record: dict) -> tuple[list[int], int]:
    """The steps of a round's training, and how many calls its checkpoints are of."""
    version = json.loads((registry / record["candidate"] / "version.json").read_text())
    folder = registry / "trainings" / version["training"]
    steps = pq.read_table(folder / "history.parquet")["step"].to_pylist()
    return steps, len({path.parents[1] for path in folder.glob("call-*/*/state.json")})
