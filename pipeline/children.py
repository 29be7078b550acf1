"""Jobs as child processes of the scheduler, which they do not outlive."""

import os
import subprocess
import sys
import time

from pipeline.bound import bound
from pipeline.scheduler import JobState
from pipeline.timetable import Record

GRACE_S = 25.0  # within Kubernetes' 30; a segment run finishes the fragments in flight meanwhile


class Children:
    """Commands of jobs/ in processes of this machine.

    They end with the scheduler, so that one that finds an attempt later may start it again.
    """

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, record: Record, environment: dict[str, str]) -> None:
        """See `Runner.start`. What the job says goes where our own words go."""
        if record.id in self._started:
            return
        job = [sys.executable, "-m", f"jobs.{record.command}", *record.arguments]
        self._started[record.id] = subprocess.Popen(  # noqa: S603 - a command of ours
            bound(job),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
        )

    def state(self, job_id: str) -> JobState | int:
        """See `Runner.state`."""
        child = self._started.get(job_id)
        if child is None:
            return JobState.UNKNOWN
        code = child.poll()
        # a signal's number is no exit code of ours: killed is killed, and may be tried again
        return JobState.RUNNING if code is None else 128 - code if code < 0 else code

    def stop(self, job_ids: list[str]) -> None:
        """See `Runner.stop`."""
        children = [self._started[job_id] for job_id in job_ids]
        for child in children:
            child.terminate()
        deadline = time.monotonic() + GRACE_S
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
