"""Run a command as a job of a Ray cluster, follow its log and end as it ends.

``maskfleet submit [--address URL] segment s3://bucket/images --out s3://bucket/run``: what comes
before the command is ours, all after it the command's. The same job again, while it runs, finds it.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs import ended, log, names, nearest
from jobs._ray import RayJobs, working_folder
from pipeline.errors import EXIT_DONE, RunRefused
from pipeline.passwords import refuse_passwords
from pipeline.submission import (
    PATIENCE_S,
    Unreachable,
    exit_code,
    followed,
    submitted,
    verdict,
)

HERE = frozenset({"jobs", "submit"})  # commands that speak to a cluster from outside
SWITCHES = frozenset({"--follow", "--no-follow", "-h", "--help"})  # options without a value
SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What may stand before the command."""

    address: str | None = None
    """The cluster's dashboard, e.g. http://127.0.0.1:8265 (`ray dashboard cluster.yaml` opens the
    tunnel). Default: RAY_API_SERVER_ADDRESS; inside a Ray job, the surrounding cluster."""
    follow: bool = True
    """Show the log and wait for the end; otherwise leave as soon as it is submitted."""
    working_dir: str | None = None
    """The folder to send. Default: this checkout; without one, what the cluster has installed."""
    env: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A variable of this environment that the job gets as well, e.g. AWS_ENDPOINT_URL."""
    patience_s: float = PATIENCE_S
    """How long the head may be unreachable while the job is followed."""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    given = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: _submit(*parsed(given)))


def parsed(arguments: Sequence[str]) -> tuple[Options, str, tuple[str, ...]]:
    """Our options, the command and its arguments.

    Raises:
        RunRefused: if there is no command, or one that cannot be submitted.
    """
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        word = arguments[place]
        place += 1 if word in SWITCHES or "=" in word or word == "--" else 2
    own = [word for word in arguments[:place] if word != "--"]
    options = tyro.cli(Options, prog="maskfleet submit", args=own, description=__doc__)
    if place >= len(arguments):
        raise RunRefused(f"say what to submit: maskfleet submit COMMAND … ({', '.join(names())})")
    command = arguments[place]
    if command not in names():
        raise RunRefused(nearest(command))
    if command in HERE:
        raise RunRefused(f"{command} speaks to a cluster from outside; run it here")
    return options, command, tuple(arguments[place + 1 :])


def _submit(options: Options, command: str, arguments: tuple[str, ...]) -> int:
    environment = _environment(options.env)
    refuse_passwords(arguments, command)
    folder = working_folder(options.working_dir)
    server = RayJobs(options.address, folder)
    if folder is None:
        log.info("no checkout here: the job runs the Maskfleet that the cluster has installed")
    job_id, new = submitted(server, command, arguments, environment, log.info)
    log.info("%s %s", job_id, "submitted" if new else "runs already: following that one")
    sys.stderr.flush()
    if not options.follow:
        sys.stdout.write(f"{job_id}\n")
        return EXIT_DONE
    try:
        job = followed(server, job_id, _write, log.info, options.patience_s)
    except KeyboardInterrupt:
        log.info("the job goes on; `maskfleet jobs stop %s` ends it", job_id)
        raise
    except Unreachable:
        log.info("%s may be going on: the same command finds it again", job_id)
        raise
    log.info(verdict(job))
    return exit_code(job)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _environment(wanted: tuple[str, ...]) -> dict[str, str]:
    for name in wanted:
        if SECRET.search(name):
            raise RunRefused(
                f"--env {name} looks like a secret, which everyone who may list jobs could read; "
                "give the cluster's nodes a role instead"
            )
        if name not in os.environ:
            raise RunRefused(f"--env {name} is not set here")
        refuse_passwords([os.environ[name]], f"--env {name}")
    return {name: os.environ[name] for name in wanted}


if __name__ == "__main__":
    sys.exit(main())
