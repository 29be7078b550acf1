"""Jobs on a cluster: what they are called, how one is found again, and how it truly ended.

Ray is not imported here: the cluster is a `JobServer`, Ray's is in jobs/_ray.py, tests have their
own. Ray calls every exit code but 0 FAILED, and its own follower may leave with 0 while the job
goes on (RAY.md section 4.1): so `followed` polls until the job is over, and `exit_code` is the
driver's own.
"""

import hashlib
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from pipeline.errors import EXIT_DONE, EXIT_REFUSED, EXIT_UNFINISHED, RunUnfinished
from pipeline.scheduler import JobState
from pipeline.timetable import Record

T = TypeVar("T")

MARK = "maskfleet"  # the key in a job's metadata that says it is ours
POLL_S = 2.0  # between two questions for a job's state; its log arrives by itself
REACH_S = 30.0  # a first contact may take so long: a tunnel that is just opening
PATIENCE_S = 600.0  # a head node may be gone so long while a job is followed
DRAIN_S = 10.0  # the log's last lines may come so long after the end

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
NEVER_BEGAN = frozenset({"RUNTIME_ENV_SETUP_FAILURE", "JOB_ENTRYPOINT_COMMAND_START_ERROR"})
"""Ray's words for a driver that could not be started as asked."""


class Unreachable(RunUnfinished):
    """The cluster does not answer; later it may."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a cluster says of a job."""

    id: str
    status: Status
    entrypoint: str
    exit_code: int | None = None
    """The driver's; None where it has not ended or was ended from outside."""
    error: str = ""
    """Ray's word for what went wrong besides the driver."""
    message: str = ""
    started_s: float | None = None
    """Seconds since 1970."""
    ended_s: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in {"STOPPED", "SUCCEEDED", "FAILED"}


class JobServer(Protocol):
    """Where a cluster takes jobs. Every call may raise `Unreachable`."""

    def submit(
        self, job_id: str, entrypoint: str, environment: dict[str, str], metadata: dict[str, str]
    ) -> bool:
        """Start a job; False if there is one of that id, whatever became of it."""
        ...

    def job(self, job_id: str) -> Job | None:
        """One job."""
        ...

    def jobs(self) -> list[Job]:
        """All jobs that carry our mark."""
        ...

    def tail(self, job_id: str) -> Iterator[str]:
        """A job's log from its beginning, as it grows, until the job is over."""
        ...

    def log(self, job_id: str) -> str:
        """A job's log so far."""
        ...

    def stop(self, job_id: str) -> None:
        """Ask a job to end."""
        ...


# --------------------------------------------------------------------------------------- submit


def entrypoint(command: str, arguments: tuple[str, ...]) -> str:
    """The shell command of a driver."""
    return shlex.join(["python", "-m", f"jobs.{command}", *arguments])


def stem(command: str, arguments: tuple[str, ...]) -> str:
    """What every submission of the same job has in common, wherever it goes."""
    told = json.dumps([command, *arguments]).encode()
    return f"mf-{command}-{hashlib.sha256(told).hexdigest()[:10]}"


def submitted(
    server: JobServer,
    command: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    tell: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> tuple[str, bool]:
    """Submit a job, or find it running; its id, and whether it is new.

    Submissions of one job are numbered. Who finds the last one over takes the next number; of two
    that take it at once, the cluster accepts one, and the other has found that one.

    Raises:
        Unreachable: if the cluster cannot be reached.
    """
    begin = f"{stem(command, arguments)}-"
    numbered = {
        int(job.id.removeprefix(begin)): job
        for job in patiently(server.jobs, REACH_S, tell, pause)
        if job.id.startswith(begin) and job.id.removeprefix(begin).isdigit()
    }
    last = max(numbered, default=0)
    if last and not numbered[last].over:
        return numbered[last].id, False
    # The number is settled before it is asked for, so that asking again cannot start a second one.
    job_id, driver = f"{begin}{last + 1}", entrypoint(command, arguments)
    metadata = {MARK: "job", "command": command}

    def submit() -> bool:
        return server.submit(job_id, driver, environment, metadata)

    return job_id, patiently(submit, REACH_S, tell, pause)


class OnCluster:
    """A scheduler's jobs on a cluster; the `Runner` of an address."""

    def __init__(self, server: JobServer) -> None:
        self._server = server

    def start(self, record: Record, environment: dict[str, str]) -> None:
        """See `Runner.start`."""
        metadata = {
            MARK: "job",
            "command": record.command,
            "schedule": environment["MASKFLEET_SCHEDULE"],
            "tick": environment["MASKFLEET_TICK"],
        }
        driver = entrypoint(record.command, record.arguments)
        self._server.submit(record.id, driver, environment, metadata)

    def state(self, job_id: str) -> JobState | int:
        """See `Runner.state`."""
        job = self._server.job(job_id)
        if job is None:
            return JobState.UNKNOWN
        return exit_code(job) if job.over else JobState.RUNNING

    def stop(self, job_ids: list[str]) -> None:
        """See `Runner.stop`; a cluster's jobs outlive their scheduler."""


# --------------------------------------------------------------------------------------- follow


def exit_code(job: Job) -> int:
    """The driver's exit code; where it has none, what its end means in our codes."""
    if job.status == "SUCCEEDED":
        return EXIT_DONE
    if job.exit_code is not None:
        # a signal: 137 from a shell, -9 from Python. Nobody decided that, so it may be tried again
        return job.exit_code if 0 < job.exit_code < 128 else EXIT_UNFINISHED
    return EXIT_REFUSED if job.error in NEVER_BEGAN else EXIT_UNFINISHED


def patiently(
    ask: Callable[[], T],
    patience_s: float,
    tell: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> T:
    """Ask until the cluster answers.

    Raises:
        Unreachable: when it has not for `patience_s`.
    """
    since, told = monotonic(), False
    while True:
        try:
            return ask()
        except Unreachable as error:
            if monotonic() - since >= patience_s:
                raise Unreachable(f"{error}; gave up after {patience_s:.0f} s") from error
            if not told:
                tell(f"{error}; asking again for {patience_s:.0f} s")
                told = True
            pause(POLL_S)


class Followed:
    """A job's log, each character once, however often the connection breaks."""

    def __init__(self, server: JobServer, job_id: str, write: Callable[[str], None]) -> None:
        self._server, self._id, self._write = server, job_id, write
        self._lock = threading.Lock()
        self._written = 0
        self._thread: threading.Thread | None = None

    def listen(self) -> None:
        """Write the log as it grows, in a thread of its own; again after a break."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()

    def again(self) -> None:
        """Listen anew: the connection may be dead without having ended."""
        self._thread = None
        self.listen()

    def rest(self) -> None:
        """Write what is left, once the job is over."""
        if self._thread is not None:
            self._thread.join(DRAIN_S)
        self._beyond(0, self._server.log(self._id))

    def _listen(self) -> None:
        position = 0
        try:
            for text in self._server.tail(self._id):
                position = self._beyond(position, text)
        except Unreachable:
            return  # `listen` tries again with the next question for the job's state

    def _beyond(self, position: int, text: str) -> int:
        """Write what of this text, which begins at a position of the log, has not been written."""
        with self._lock:
            end = position + len(text)
            if end > self._written:
                self._write(text[max(0, self._written - position) :])
                self._written = end
            return end


def followed(
    server: JobServer,
    job_id: str,
    write: Callable[[str], None],
    tell: Callable[[str], None],
    patience_s: float = PATIENCE_S,
    pause: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Job:
    """Follow a job to its end.

    Raises:
        RunUnfinished: if the cluster is gone for too long, or has forgotten the job.
    """
    log = Followed(server, job_id, write)
    broke = False

    def told(text: str) -> None:
        nonlocal broke
        broke = True
        tell(text)

    while True:
        job = patiently(lambda: server.job(job_id), patience_s, told, pause, monotonic)
        if job is None:
            raise RunUnfinished(
                f"the cluster no longer knows job {job_id}: it was started anew; "
                "submit the same command again, it goes on from what is committed"
            )
        if job.over:
            break
        if job.status == "RUNNING":
            log.again() if broke else log.listen()
            broke = False
        pause(POLL_S)
    try:
        patiently(log.rest, REACH_S, tell, pause, monotonic)
    except Unreachable as error:
        tell(f"the end of the log is missing: {error}")
    return job


def verdict(job: Job) -> str:
    """How a job ended, in a line."""
    code = exit_code(job)
    if job.exit_code is not None and not 0 <= job.exit_code < 128:
        return f"{job.id}: its driver was killed ({job.exit_code}); exit code {code}"
    if job.exit_code is not None or job.status == "SUCCEEDED":
        return f"{job.id}: ended with exit code {code}"
    why = job.error or job.message.partition("\n")[0]
    return f"{job.id}: {job.status.lower()}{f' ({why})' if why else ''}; exit code {code}"
