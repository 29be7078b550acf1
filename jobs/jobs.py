"""List, read and stop the jobs that we submitted to a Ray cluster."""

import json as json_module
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import tyro

from jobs import ended, log
from jobs._ray import RayJobs
from pipeline.errors import EXIT_DONE, RunRefused
from pipeline.progress import duration
from pipeline.schedule import failed
from pipeline.submission import (
    REACH_S,
    Job,
    exit_code,
    followed,
    patiently,
    verdict,
)

Id = Annotated[str, tyro.conf.Positional]


def list_(address: str | None = None, json: bool = False) -> int:
    """List our jobs, the newest last.

    Args:
        address: the cluster's dashboard, e.g. http://127.0.0.1:8265.
        json: machine-readable, one object per line.
    """
    jobs = sorted(_asked(RayJobs(address)), key=lambda job: job.started_s or 0)
    for job in jobs:
        sys.stdout.write(f"{json_module.dumps(asdict(job)) if json else _line(job)}\n")
    return EXIT_DONE


def logs(job_id: Id, address: str | None = None, follow: bool = False) -> int:
    """Print a job's log.

    Args:
        job_id: its id, or the beginning of it.
        address: the cluster's dashboard, e.g. http://127.0.0.1:8265.
        follow: go on until the job ends, and end as it ends.
    """
    server = RayJobs(address)
    job = _one(_asked(server), job_id)
    if not follow:
        sys.stdout.write(patiently(lambda: server.log(job.id), REACH_S, log.info))
        return EXIT_DONE
    over = followed(server, job.id, _write, log.info)
    log.info(verdict(over))
    return exit_code(over)


def stop(job_id: Id, address: str | None = None) -> int:
    """Ask a job to end, and wait until it has.

    Args:
        job_id: its id, or the beginning of it.
        address: the cluster's dashboard, e.g. http://127.0.0.1:8265.
    """
    server = RayJobs(address)
    job = _one(_asked(server), job_id)
    if job.over:
        log.info("%s was over already (%s)", job.id, job.status.lower())
        return EXIT_DONE
    patiently(lambda: server.stop(job.id), REACH_S, log.info)
    log.info(verdict(followed(server, job.id, lambda _: None, log.info)))
    return EXIT_DONE


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _asked(server: RayJobs) -> list[Job]:
    return patiently(server.jobs, REACH_S, log.info)


def _one(jobs: list[Job], begin: str) -> Job:
    found = [job for job in jobs if job.id == begin] or [
        job for job in jobs if job.id.startswith(begin)
    ]
    if not found:
        raise RunRefused(f"we submitted no job {begin}; `maskfleet jobs list` says which there are")
    if len(found) > 1:
        raise RunRefused(f"{begin} may be any of {', '.join(job.id for job in found)}; say more")
    return found[0]


def _line(job: Job) -> str:
    began = "-"
    took = "-"
    if job.started_s is not None:
        began = datetime.fromtimestamp(job.started_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        until = datetime.now(UTC).timestamp() if job.ended_s is None else job.ended_s
        took = duration(until - job.started_s)
    code, state = "-", job.status.lower()
    if job.over:
        code = str(exit_code(job))
        # Ray calls whatever is not 0 failed
        state = state if job.status == "STOPPED" else "failed" if failed(int(code)) else "done"
    driver = job.entrypoint.removeprefix("python -m jobs.")
    return f"{job.id}  {state:<7} {code:>3}  {began}  {took:>8}  {driver}"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    commands = {"list": list_, "logs": logs, "stop": stop}
    return ended(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="maskfleet jobs", description=__doc__, args=arguments
        )
    )


if __name__ == "__main__":
    sys.exit(main())
