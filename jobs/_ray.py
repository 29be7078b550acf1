"""Ray's job server as a `JobServer`, and what of a folder is sent to it.

The token comes from where Ray looks for it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)
and goes into a header; it is in no argument, no message and no job's environment.
"""

import asyncio
import contextlib
import fnmatch
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import RunRefused
from pipeline.submission import MARK, Job, Unreachable

T = TypeVar("T")

ANSWER_S = 30.0  # Ray's client itself waits for ever
SEND_S = 600.0  # for the package, which may be large and the line slow
STOP_S = "30"  # between asking a job to end and killing it; Ray's 3 s would cut fragments short
LARGEST = 5 * 1024**2  # bytes of one file that is sent: code and small models, never data
SECRETS = (
    "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "*.tfvars", "id_rsa*", "id_ed25519*",
    "*credentials*", "*service?account*.json", "*token", "*.env",
)  # fmt: skip
NEVER = ("__pycache__", "*.egg-info", "node_modules", "venv", "build", "dist")
RUNS = ("run.json", "zarr.json", "pyvenv.cfg")  # what tells runs, arrays and environments


class RayJobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None, folder: Path | None = None) -> None:
        """Contacts nobody yet.

        Args:
            address: of the cluster's dashboard, e.g. http://127.0.0.1:8265; None: what
                RAY_API_SERVER_ADDRESS says, or inside a Ray job the surrounding cluster.
            folder: what jobs get as their working directory; None: nothing, their image has it.
        """
        self._address = _checked(address)
        self._folder = folder
        self._made: Any = None

    def submit(
        self, job_id: str, entrypoint: str, environment: dict[str, str], metadata: dict[str, str]
    ) -> bool:
        """See `JobServer.submit`."""
        if self.job(job_id) is not None:
            return False
        runtime: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_S, **environment}}
        if self._folder is not None:
            runtime |= {"working_dir": str(self._folder), "excludes": packed(self._folder)}
        asked = {"entrypoint": entrypoint, "runtime_env": runtime, "metadata": metadata}
        try:
            self._ask(lambda client: client.submit_job(submission_id=job_id, **asked))
        except (RunRefused, Unreachable):
            # Ray answers 400 or 500 where the id is taken, or the answer to our own call was lost
            if self.job(job_id) is None:
                raise
            return False
        return True

    def job(self, job_id: str) -> Job | None:
        """See `JobServer.job`."""
        try:
            return _job(self._ask(lambda client: client.get_job_info(job_id)))
        except _NotThere:
            return None

    def jobs(self) -> list[Job]:
        """See `JobServer.jobs`."""
        listed = self._ask(lambda client: client.list_jobs())
        return [_job(about) for about in listed if MARK in (about.metadata or {})]

    def log(self, job_id: str) -> str:
        """See `JobServer.log`."""
        return self._ask(lambda client: client.get_job_logs(job_id))

    def tail(self, job_id: str) -> Iterator[str]:
        """See `JobServer.tail`."""
        client = self._client()
        loop = asyncio.new_event_loop()
        stream = client.tail_job_logs(job_id)
        try:
            while True:
                try:
                    text = self._translated(lambda: loop.run_until_complete(anext(stream)))
                except StopAsyncIteration:
                    return
                yield text
        finally:
            with contextlib.suppress(Exception):  # whatever a broken connection says when closed
                loop.run_until_complete(stream.aclose())
            loop.close()

    def stop(self, job_id: str) -> None:
        """See `JobServer.stop`."""
        self._ask(lambda client: client.stop_job(job_id))

    def _ask(self, question: Callable[[Any], T]) -> T:
        return self._translated(lambda: question(self._client()))

    def _client(self) -> Any:  # noqa: ANN401 - Ray's
        if self._made is None:
            self._made = self._translated(lambda: _client(self._address))
        return self._made

    def _translated(self, call: Callable[[], T]) -> T:
        """Ray's errors in our words."""
        import requests
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError

        where = self._address or "the surrounding cluster"
        try:
            return call()
        except AuthenticationError:
            raise RunRefused(
                f"{where} does not take our token; RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
                "~/.ray/auth_token must hold the cluster's"
            ) from None
        except (ConnectionError, requests.RequestException, ClientError, TimeoutError) as error:
            raise Unreachable(f"{where} does not answer ({type(error).__name__})") from None
        except (RuntimeError, ValueError) as error:
            raise _verdict(where, error) from None


class _NotThere(RunRefused):
    """The cluster knows no such job."""


def _verdict(where: str, error: Exception) -> Exception:
    text = str(error)
    code = re.search(r"status code (\d+)", text)
    said = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    if code is None:
        return (RunRefused if isinstance(error, ValueError) else Unreachable)(f"{where}: {said}")
    if code[1] == "404":
        return _NotThere(f"{where}: there is no such job")
    kind = Unreachable if code[1].startswith("5") else RunRefused
    return kind(f"{where}: {said}")


def _client(address: str | None) -> Any:  # noqa: ANN401 - Ray's
    _expect_token()
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk",
                 "_private.runtime_env.packaging", "_private.runtime_env.working_dir"):  # fmt: skip
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # a line per package otherwise

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:  # noqa: ANN401
            limit = SEND_S if method == "PUT" else ANSWER_S
            return super()._do_request(method, endpoint, timeout=limit, **more)

    with _alone(address):
        return Client(address)


def _expect_token() -> None:
    """Without this variable Ray sends no token, though it lies where it belongs."""
    there = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if there or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextlib.contextmanager
def _alone(address: str | None) -> Iterator[None]:
    """Ray's client prefers these variables to the address it is given: not while we give one."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if address is not None else ()
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _checked(address: str | None) -> str | None:
    """An address that is given, never picked up by accident.

    Raises:
        RunRefused: on any other, or if there is none.
    """
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if given == "auto" or given is None:
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            return None
        raise RunRefused(
            "no cluster is given; say --address http://127.0.0.1:8265 "
            "(`ray dashboard cluster.yaml` opens the tunnel)"
        )
    if not re.fullmatch(r"https?://[^/@?#\s]+/?", given):
        raise RunRefused(
            f"--address {re.sub('//.*@', '//***@', given)} is not the address of a dashboard, "
            "http://host:8265"
        )
    return given.rstrip("/")


def _job(about: Any) -> Job:  # noqa: ANN401 - Ray's JobDetails
    return Job(
        id=about.submission_id or about.job_id or "",
        status=about.status.value,
        entrypoint=about.entrypoint,
        exit_code=about.driver_exit_code,
        error=about.error_type or "",
        message=about.message or "",
        started_s=None if about.start_time is None else about.start_time / 1000,
        ended_s=None if about.end_time is None else about.end_time / 1000,
        metadata=about.metadata or {},
    )


# -------------------------------------------------------------------------------------- package


def packed(folder: Path) -> list[str]:
    """What of a folder is not sent, as patterns for Ray; .gitignore holds besides.

    Raises:
        RunRefused: if what is left exceeds what a cluster takes, naming the largest.
    """
    from ray._private.runtime_env.packaging import (
        GCS_STORAGE_MAX_SIZE,
        _dir_travel,
        _get_excludes,
    )

    left_out = [f"/{_escaped(path)}" for path in unwanted(folder)]
    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            top = path.relative_to(folder).parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size

    # Ray's own walk, so that the sum is of what it will send (it does not compress)
    _dir_travel(folder, [_get_excludes(folder, left_out)], count, include_gitignore=True)
    total = sum(sizes.values())
    if total >= GCS_STORAGE_MAX_SIZE:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{name} ({size / 1e6:.0f} MB)" for name, size in largest)
        raise RunRefused(
            f"{folder} holds {total / 1e6:.0f} MB to send, a cluster takes "
            f"{GCS_STORAGE_MAX_SIZE / 1e6:.0f}: move data out of it or name it in .gitignore; "
            f"most is in {named}"
        )
    return left_out


def unwanted(folder: Path) -> list[str]:
    """Paths below a folder that no job needs or must not leave this machine.

    Hidden ones, keys, environments, caches, runs, whatever is large, and links that lead out.
    """
    found: list[str] = []
    inside = os.path.realpath(folder)
    for where, folders, files in os.walk(folder):
        below = Path(where).relative_to(folder)
        for name in list(folders):
            path = Path(where, name)
            if path.is_symlink() or _matches(name, NEVER) or _holds(path, RUNS):
                found.append((below / name).as_posix())
                folders.remove(name)
        for name in files:
            path = Path(where, name)
            out = path.is_symlink() and not os.path.realpath(path).startswith(inside + os.sep)
            if out or _matches(name, SECRETS) or not path.is_file() or _large(path):
                found.append((below / name).as_posix())
    return sorted(found)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return name.startswith(".") or any(fnmatch.fnmatch(name.lower(), p) for p in patterns)


def _holds(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def _large(path: Path) -> bool:
    return path.stat().st_size > LARGEST


def _escaped(path: str) -> str:
    return re.sub(r"([\\*?\[\]!# ])", r"\\\1", path)


def working_folder(given: str | None = None) -> Path | None:
    """The folder whose code jobs run: the given one, else the checkout around or under us.

    None where Maskfleet is installed and no checkout is at hand: then the cluster's own runs.

    Raises:
        RunRefused: if the given one is none.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise RunRefused(f"--working-dir {given} is not a folder")
        return Path(given).resolve()
    for candidate in (Path.cwd(), Path(__file__).parents[1]):
        checkout = (candidate / "jobs" / "__main__.py").is_file()
        if checkout and (candidate / "pyproject.toml").is_file():
            return candidate.resolve()
    return None
