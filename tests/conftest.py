"""What every test finds: a clean environment, its lane by folder, and the fixtures that cost time.

README.md beside this file says how to run each lane and what each fixture costs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# An editable install puts the three packages on the path, not the folder that holds `tests`.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import s3server
from tests.faultproxy import FaultProxy

TESTS = Path(__file__).parent
LANES = ("cluster", "fault", "s3", "browser", "gpu", "bench")
WORKER_CPUS = 2  # logical, per node: actors of 0.5 leave room to recover when one node is lost
OBJECT_STORE_BYTES = 150 * 1024**2  # per node; what Ray's own tests give theirs
LOOPBACK = "127.0.0.1"

_home: tempfile.TemporaryDirectory[str] | None = None
_s3_refused: str | None = None


# -- lanes and environment -----------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`instructions`: every set of instructions that C was compiled for and this core knows."""
    if "instructions" in metafunc.fixturenames:
        from models.parts import kernels  # torch: only for those who ask

        sets = list(kernels.known())
        ids = [f"{each.lanes} lanes" for each in sets] or ["none"]
        metafunc.parametrize("instructions", sets or [None], ids=ids, indirect=True)


@pytest.fixture
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of `models.parts.kernels`, by one set of instructions after the other."""
    if request.param is None:
        pytest.skip("nothing was compiled: no C compiler when this was installed")
    monkeypatch.setattr("models.parts.kernels.LIBRARY", request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the slow lane whose folder it lies in: nobody can forget it."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in LANES:
            item.add_marker(folder)


def pytest_configure() -> None:
    """Set the environment before any test module can import Ray."""
    global _home
    _home = tempfile.TemporaryDirectory(prefix="mf-home-")  # mode 0700
    _clean(os.environ, Path(_home.name))


def pytest_unconfigure() -> None:
    """Take the home folder away."""
    if _home is not None:
        _home.cleanup()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that the S3 server was not there: a row of "s" is easily overlooked."""
    if _s3_refused:
        terminalreporter.section("NO S3 SERVER", red=True)
        terminalreporter.line(f"Tests that need one were SKIPPED, not passed: {_s3_refused}")


def _clean(environment: os._Environ[str], home: Path) -> None:
    # AWS_*: no test may reach a real account. RAY_*: a RAY_ADDRESS or token from outside would
    # make a test join a foreign cluster.
    for name in [n for n in environment if n.startswith(("AWS_", "RAY_"))]:
        del environment[name]
    token = home / ".ray" / "auth_token"  # Ray itself would write it world-readable
    token.parent.mkdir(mode=0o700)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    (home / "ray").mkdir()  # RAY_TMPDIR below: Ray writes the address of its last cluster there
    environment.update(
        {
            "HOME": str(home),  # no ~/.aws, no ~/.ray
            "AWS_EC2_METADATA_DISABLED": "true",  # no key is an error now, not after a time-out
            # Not meant for Linux at all: as a side effect it keeps Ray on 127.0.0.1, where it
            # would otherwise listen on the machine's outside address; two_ray_nodes makes sure.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # with its 15, workers get next to nothing beside others
            # Explicitly, because unset it depends on whether some token file exists.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(home),  # /tmp/ray/ray_current_cluster belongs to everybody
            # a proxy for the outside world must not see what is meant for loopback
            "NO_PROXY": f"{LOOPBACK},localhost",
            "no_proxy": f"{LOOPBACK},localhost",
        }
    )


# -- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share an untrained bundle of a few hundred weights: background and nucleus, stride 4."""
    from tests.bundles import tiny_bundle as made  # torch: not for those who need no model

    return made(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share an untrained bundle that tells three kinds of whole pictures apart."""
    from tests.bundles import tiny_classifier as made  # torch: not for those who need no model

    return made(tmp_path_factory.mktemp("bundle") / "classifier")


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share a folder of 65 images in three formats, five of them bad."""
    from tests.archives import filled
    from tests.objects import mixed

    return filled(tmp_path_factory.mktemp("archive"), mixed())


@pytest.fixture(scope="session")
def oracle(
    archive: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Tell what an undisturbed run over `archive` in one process holds."""
    from tests import runs

    folder = tmp_path_factory.mktemp("oracle")
    runs.finished(runs.words(archive, folder / "run", tiny_bundle), folder / "log")
    return runs.content(folder / "run")


# -- S3 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_address() -> Iterator[s3server.S3Server]:
    """Fix endpoint and keys of the session's server without starting it: Ray nodes inherit them."""
    with s3server.temporary_folder() as folder:
        yield s3server.S3Server(folder, s3server.free_ports())


@pytest.fixture(scope="session")
def s3_server(s3_address: s3server.S3Server) -> Iterator[s3server.S3Server]:
    """Start the session's S3 server, or skip loudly where it is not installed."""
    global _s3_refused
    if reason := s3server.why_not():
        _s3_refused = reason
        pytest.skip(f"no S3 server: {reason}")
    try:
        s3_address.create()
        yield s3_address
    finally:
        s3_address.close()


@pytest.fixture
def bucket(s3_server: s3server.S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a fresh bucket and point AWS_* at it; returns its name."""
    s3_server.recover()  # an earlier test may have killed it and failed before it could put it back
    name = f"test-{secrets.token_hex(6)}"
    with s3_server.client() as s3:
        s3.create_bucket(Bucket=name)
    for variable, value in s3_server.environment().items():
        monkeypatch.setenv(variable, value)
    return name


@pytest.fixture
def fault_proxy(
    s3_server: s3server.S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """Put a proxy before the server and point AWS_ENDPOINT_URL at it; the test adds the faults."""
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


# -- Ray -----------------------------------------------------------------------------------------


@dataclass
class RayNodes:
    """A head that does no work and two workers, all on 127.0.0.1."""

    address: str
    """For `ray.init(address=...)` or `--on`; never "auto", which may find another cluster."""
    cluster: Any  # ray.cluster_utils.Cluster: Ray is imported by those who use it only
    workers: list[Any]

    @property
    def raylets(self) -> list[int]:
        """Process ids of the workers' raylets, less killed ones; all that runs is below them."""
        running = [node.all_processes for node in self.workers]
        return [found["raylet"][0].process.pid for found in running if "raylet" in found]

    def kill(self, worker: int) -> None:
        """SIGKILL one worker node and everything on it; Ray notices after about 15 s."""
        self.cluster.remove_node(self.workers[worker], allow_graceful=False)


@contextmanager
def two_ray_nodes(environment: dict[str, str], gpus: int = 0) -> Iterator[RayNodes]:
    """Run the nodes with these variables added; their workers see no later ones.

    ``gpus`` each has by Ray's books alone: actors are fed as beside one, and predict on the CPU.
    """
    from ray.cluster_utils import Cluster

    # short: Ray puts Unix sockets 60 characters below it, and their paths end at 107 bytes
    folder = tempfile.mkdtemp(prefix="mf-ray-")
    size = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster()
        try:
            # the first is the head; None: any free port, where by itself it insists on 8265
            cluster.add_node(num_cpus=0, temp_dir=folder, dashboard_port=None, **size)
            size |= {"num_cpus": WORKER_CPUS, "num_gpus": gpus}
            workers = [cluster.add_node(**size) for _ in range(2)]
            if not cluster.address.startswith(f"{LOOPBACK}:"):
                raise RuntimeError(f"Ray listens on {cluster.address}, which is not loopback")
            yield RayNodes(cluster.address, cluster, workers)
        finally:
            cluster.shutdown()  # never `ray stop`: it ends every Ray on the machine
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_two_nodes(s3_address: s3server.S3Server) -> Iterator[RayNodes]:
    """Share two worker nodes in the whole session; leave them as you found them."""
    with two_ray_nodes(s3_address.environment()) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def ray_gpu_nodes(s3_address: s3server.S3Server) -> Iterator[RayNodes]:
    """Share two worker nodes with a GPU each, by Ray's books, in one file."""
    with two_ray_nodes(s3_address.environment(), gpus=1) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def ray_own_nodes(s3_address: s3server.S3Server) -> Iterator[RayNodes]:
    """Give this file two worker nodes of its own, to kill."""
    with two_ray_nodes(s3_address.environment()) as nodes:
        yield nodes
