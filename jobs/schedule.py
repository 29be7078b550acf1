"""Run commands by the clock: cron times, on this machine or a cluster, each started once.

``maskfleet schedule add SCHEDULES NAME --cron "30 3 * * *" --zone Europe/Berlin -- COMMAND …``;
SCHEDULES is a folder or s3://bucket/prefix. ``run`` stays, ``tick`` does one round and ends.
"""

import json as json_module
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal
from uuid import uuid4
from zoneinfo import ZoneInfo

import tyro

from jobs import ended, log, names, nearest
from jobs._ray import RayJobs, working_folder
from pipeline import manifests
from pipeline.children import Children
from pipeline.errors import EXIT_DONE, RunRefused
from pipeline.passwords import refuse_passwords
from pipeline.progress import duration
from pipeline.rounds import EVERY_S, Rounds
from pipeline.schedule import Spec, check_name, failed, following, tick_name
from pipeline.scheduler import Runner, Scheduler
from pipeline.storage import absolute, check_create_only, open_store
from pipeline.submission import OnCluster
from pipeline.timetable import Record, Timetable, Version

Text = Annotated[str, tyro.conf.Positional]

UNSEEN = frozenset({"jobs", "schedule", "submit"})  # commands that make no sense on a schedule


# ------------------------------------------------------------------------------------- the specs


def add(
    schedules: Text,
    name: Text,
    *,
    cron: str,
    zone: str = "UTC",
    retries: int = 0,
    retry_after_s: float = 300.0,
    address: str | None = None,
    replace: bool = False,
    job: tyro.conf.Suppress[tuple[str, ...]] = (),
) -> int:
    """Add a schedule for the command after `--`; {tick} in its arguments stands for the tick.

    Args:
        schedules: where schedules lie, a folder or s3://bucket/prefix.
        name: what to call it: a-z, 0-9 and '-'.
        cron: minute, hour, day, month, weekday, e.g. "30 3 * * MON-FRI".
        zone: the time zone of these, e.g. Europe/Berlin.
        retries: how often a job that failed is tried again for the same tick.
        retry_after_s: seconds between a failure and the next attempt.
        address: the cluster that runs the job; default: a child process of the scheduler.
        replace: write over what the schedule said before.
        job: what comes after `--`.
    """
    if not job:
        raise RunRefused("say what to run: maskfleet schedule add … -- COMMAND …")
    if job[0] not in names():
        raise RunRefused(nearest(job[0]))
    if job[0] in UNSEEN:
        raise RunRefused(f"{job[0]} makes no sense on a schedule")
    refuse_passwords(job, job[0])
    timetable = Timetable(open_store(schedules))
    before = timetable.version(check_name(name))
    check_create_only(timetable.store)
    if address is not None:
        RayJobs(address)  # refuses an address that is none
    spec = Spec(
        cron=cron,
        zone=zone,
        command=job[0],
        arguments=job[1:],
        retries=retries,
        retry_after_s=retry_after_s,
        address=address,
        since=datetime.now(UTC),
        identity=uuid4().hex[:8] if before is None else before.spec.identity,
    )
    if before is not None and before.spec.state != "removed":
        if _but_when(spec, before.spec) == before.spec:
            log.info("%s is there already, just so", name)
            return EXIT_DONE
        if not replace:
            raise RunRefused(
                f"there is a schedule {name} that says otherwise; "
                "choose another name or say --replace"
            )
    timetable.change(name, 0 if before is None else before.number, spec)
    log.info("%s: next at %s", name, _shown(_next(spec), zone))
    return EXIT_DONE


def _but_when(spec: Spec, before: Spec) -> Spec:
    return Spec.from_json({**spec.to_json(), "since": before.since.isoformat()})


def pause(schedules: Text, name: Text) -> int:
    """Start nothing any more until it is resumed; what runs goes on.

    Args:
        schedules: where schedules lie.
        name: which.
    """
    return _altered(schedules, name, "paused")


def resume(schedules: Text, name: Text) -> int:
    """Start again; what was missed meanwhile is not caught up.

    Args:
        schedules: where schedules lie.
        name: which.
    """
    return _altered(schedules, name, "active")


def remove(schedules: Text, name: Text) -> int:
    """Forget a schedule; its history stays.

    Args:
        schedules: where schedules lie.
        name: which.
    """
    return _altered(schedules, name, "removed")


def _altered(schedules: str, name: str, state: Literal["active", "paused", "removed"]) -> int:
    timetable = Timetable(open_store(schedules))
    version = _version(timetable, name)
    if version.spec.state == state:
        log.info("%s is %s already", name, state)
        return EXIT_DONE
    values = {**version.spec.to_json(), "state": state, "since": datetime.now(UTC).isoformat()}
    spec = Spec.from_json(values)
    timetable.change(name, version.number, spec)
    log.info("%s: %s", name, f"next at {_shown(_next(spec), spec.zone)}" if _next(spec) else state)
    return EXIT_DONE


def _version(timetable: Timetable, name: str) -> Version:
    version = timetable.version(name)
    if version is None or version.spec.state == "removed":
        raise RunRefused(
            f"there is no schedule {name} below {timetable.store.uri}; "
            "`maskfleet schedule list` says which there are"
        )
    return version


# ---------------------------------------------------------------------------------- what they say


def list_(schedules: Text, json: bool = False) -> int:
    """List the schedules: what, when next, how it went last.

    Args:
        schedules: where schedules lie.
        json: machine-readable, one object per line.
    """
    timetable = Timetable(open_store(schedules))
    for name in timetable.names():
        version = timetable.version(name)
        if version is None or version.spec.state == "removed":
            continue
        spec = version.spec
        last = timetable.history(name, last=1)
        about = {
            "name": name,
            "state": spec.state,
            "cron": spec.cron,
            "zone": spec.zone,
            "next": _shown(_next(spec), spec.zone),
            "last": _outcome(last[0]) if last else "never ran",
            "job": [spec.command, *spec.arguments],
        }
        job = " ".join(about["job"])
        text = (
            f"{name}  {spec.state}  [{spec.cron}] {spec.zone}  next {about['next']}  "
            f"last {about['last']}  {job}"
        )
        sys.stdout.write(f"{json_module.dumps(about) if json else text}\n")
    return EXIT_DONE


def history(schedules: Text, name: Text, last: int = 20, json: bool = False) -> int:
    """List what was started and how it ended, the newest last.

    Args:
        schedules: where schedules lie.
        name: which.
        last: how many attempts.
        json: machine-readable, one object per line.
    """
    timetable = Timetable(open_store(schedules))
    if timetable.version(name) is None:
        raise RunRefused(f"there is no schedule {name} below {timetable.store.uri}")
    for record in timetable.history(name, last):
        about = {
            "tick": tick_name(record.tick),
            "attempt": record.number,
            "id": record.id,
            "begun": record.begun.isoformat(),
            "ended": None if record.ended is None else record.ended.isoformat(),
            "outcome": record.outcome,
            "detail": record.detail,
        }
        text = f"{_outcome(record)}  {record.id}"
        sys.stdout.write(f"{json_module.dumps(about) if json else text}\n")
    return EXIT_DONE


def print_(
    schedules: Text,
    name: Text,
    as_: Annotated[Literal["kuberay", "cronjob", "crontab"], tyro.conf.arg(name="as")],
    *,
    image: str = manifests.IMAGE,
    address: str | None = None,
) -> int:
    """Print a schedule for another scheduler.

    Args:
        schedules: where schedules lie; for pods below s3://.
        name: which.
        as_: a crontab line, a Kubernetes CronJob, or a KubeRay RayCronJob.
        image: the container image of pods.
        address: the cluster that runs the job; default: what the schedule says.
    """
    uri = absolute(schedules)
    spec = _version(Timetable(open_store(uri)), name).spec
    where = spec.address if address is None else address
    made: dict[str, Callable[[], str]] = {
        "crontab": lambda: manifests.crontab(uri, name, spec, _program(), address),
        "cronjob": lambda: manifests.cronjob(uri, name, spec, image, where),
        "kuberay": lambda: manifests.kuberay(uri, name, spec, image),
    }
    sys.stdout.write(made[as_]())
    return EXIT_DONE


def _program() -> list[str]:
    """How cron, which knows no PATH of ours, starts this program."""
    beside = Path(sys.executable).with_name("maskfleet")
    found = str(beside) if beside.exists() else shutil.which("maskfleet")
    return ["maskfleet" if found is None else found]


def _next(spec: Spec) -> datetime | None:
    now = datetime.now(UTC)
    return following(spec.cron, spec.zone, now) if spec.state == "active" else None


def _shown(when: datetime | None, zone: str) -> str:
    return "-" if when is None else when.astimezone(ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M %Z")


def _outcome(record: Record) -> str:
    took = "" if record.ended is None else duration((record.ended - record.begun).total_seconds())
    if record.outcome is None:
        said = "has not ended"
    elif record.outcome == "lost":
        said = f"lost ({record.detail})"
    else:
        said = f"{'FAILED' if failed(record.outcome) else 'done'} ({record.outcome}) in {took}"
    return f"{tick_name(record.tick)} attempt {record.number} {said}"


# ---------------------------------------------------------------------------------------- rounds


def tick(
    schedules: Text,
    name: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    address: str | None = None,
    wait: bool = False,
) -> int:
    """Do one round: start what is due, write down what has ended; for cron and Kubernetes.

    A job that runs as a child process is waited for. Says nothing where there is nothing to do.

    Args:
        schedules: where schedules lie.
        name: only this one.
        address: the cluster that runs the jobs; default: what each schedule says.
        wait: stay until what was started on a cluster has ended as well, and been tried again.

    Returns:
        0, or the exit code of a job that failed; 4 if the store or the cluster did not answer.
    """
    timetable = Timetable(open_store(schedules))
    if name is not None:
        _version(timetable, name)
    wanted = timetable.names() if name is None else [name]
    with _rounds(timetable, address) as rounds:
        return rounds.tick(wanted, wait=wait)


def run(
    schedules: Text,
    *,
    address: str | None = None,
    every_s: float = EVERY_S,
) -> int:
    """Stay and do rounds until stopped; also as a Ray job.

    Args:
        schedules: where schedules lie.
        address: the cluster that runs the jobs; default: what each schedule says.
        every_s: seconds between two rounds.
    """
    timetable = Timetable(open_store(schedules))
    with _rounds(timetable, address) as rounds:
        log.info("looking after %s every %.0f s", timetable.store.uri, every_s)
        rounds.stay(timetable.names, every_s)
    return EXIT_DONE


@contextmanager
def _rounds(timetable: Timetable, address: str | None) -> Iterator[Rounds]:
    children = Children()

    @lru_cache
    def runner(where: str | None) -> Runner:
        return children if where is None else OnCluster(RayJobs(where, working_folder()))

    scheduler = Scheduler(timetable, runner, log.info, address)
    try:
        yield Rounds(scheduler, log.info, _heard().wait)
    finally:
        scheduler.close()


def _heard() -> threading.Event:
    """Ctrl-C or SIGTERM: stop the jobs in our care, in order, and leave."""
    stop = threading.Event()

    def heard(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's contract
        stop.set()

    with suppress(ValueError):  # not in the main thread: nobody can signal it
        signal.signal(signal.SIGINT, heard)
        signal.signal(signal.SIGTERM, heard)
    return stop


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    given = sys.argv[1:] if arguments is None else arguments
    # tyro would take the job's flags for ours
    own = given[: given.index("--")] if "--" in given else given
    commands: dict[str, Callable[..., int]] = {
        "add": partial(add, job=tuple(given[len(own) + 1 :])),
        "list": list_,
        "pause": pause,
        "resume": resume,
        "remove": remove,
        "run": run,
        "tick": tick,
        "history": history,
        "print": print_,
    }
    return ended(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="maskfleet schedule", description=__doc__, args=own
        )
    )


if __name__ == "__main__":
    sys.exit(main())
