"""`ray job submit --working-dir . -- python -m jobs.segment …` on a cluster that people start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EXIT_REFUSED, EXIT_REJECTIONS
from tests import runs
from tests.s3server import free_ports

MOST_UPLOADED = 8_000_000  # bytes of code; history, environments and data stay at home


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """`ray start --head` as cluster.yaml does it; the address of its dashboard."""
    folder = Path(tempfile.mkdtemp(prefix="mf-job-"))  # short: Unix sockets lie below it
    first = free_ports(8)
    named = ["port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port",
             "object-manager-port", "node-manager-port", "runtime-env-agent-port",
             "metrics-export-port"]  # fmt: skip
    ports = [f"--{name}={first + n}" for n, name in enumerate(named)]
    command = ["start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1",
               "--node-ip-address=127.0.0.1", "--object-store-memory=150000000",
               f"--temp-dir={folder}", *ports]  # fmt: skip
    log = (folder / "head.log").open("wb")
    # the job's `python` is the first on the head's path
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = subprocess.Popen(
        ray(*command),
        env={**os.environ, "PATH": path, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"},
        stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{first + 1}"
    try:
        runs.until(lambda: answers(address, token()) == 200, "the dashboard")
        yield address
    finally:
        started.send_signal(signal.SIGTERM)  # never `ray stop`: it ends every Ray on the machine
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def ray(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *words]


def token() -> str:
    return Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()


def asked(address: str, credentials: str | None) -> urllib.request.Request:
    headers = {"Authorization": f"Bearer {credentials}"} if credentials else {}
    return urllib.request.Request(f"{address}/api/jobs/", None, headers)


def answers(address: str, credentials: str | None) -> int:
    """The HTTP status for a list of the jobs; 0 while nobody listens."""
    try:
        with urllib.request.urlopen(asked(address, credentials)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def submitted(address: str, *words: str) -> tuple[int, str, dict]:
    """Submit from the project's folder, as the README says: exit code, output, Ray's verdict."""
    done = subprocess.run(
        ray("job", "submit", f"--address={address}", "--working-dir=.", "--", "python", "-m",
            "jobs.segment", *words),
        cwd=runs.ROOT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    with urllib.request.urlopen(asked(address, token())) as answer:
        jobs = json.load(answer)
    newest = max(jobs, key=lambda job: job["start_time"])
    return done.returncode, done.stdout + done.stderr, newest


def test_without_the_token_nobody_submits(head):
    assert (answers(head, None), answers(head, "wrong" * 8)) == (401, 403)


@pytest.mark.timeout(200)
def test_a_submitted_job_makes_the_same_run(head, archive, tiny_bundle, oracle, tmp_path):
    run = tmp_path / "run"
    code, said, job = submitted(head, *runs.words(archive, run, tiny_bundle))
    assert "3 other objects skipped" in said, said
    runs.assert_same(run, oracle)
    assert (job["driver_exit_code"], job["status"]) == (EXIT_REJECTIONS, "FAILED"), said
    assert code == 1  # Ray's: any exit code but 0 is a failure to it (docs say so)
    assert uploaded(job) < MOST_UPLOADED


def uploaded(job: dict) -> int:
    """Bytes of the working directory as the head unpacked it."""
    name = job["runtime_env"]["working_dir"].rpartition("/")[2].removesuffix(".zip")
    below = "mf-job-*/session_2*/runtime_resources/working_dir_files"
    (folder,) = Path(tempfile.gettempdir()).glob(f"{below}/{name}")
    assert not (folder / ".git").exists()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(120)
def test_a_job_that_is_refused_says_so(head, tiny_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    code, said, job = submitted(
        head, *runs.words(tmp_path / "empty", tmp_path / "run", tiny_bundle)
    )
    assert (code, job["driver_exit_code"]) == (1, EXIT_REFUSED), said
    assert "there are no images below" in said
