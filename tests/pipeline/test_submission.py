"""Submitting to a cluster that answers late, twice or not at all, and ending as the job ended."""

from __future__ import annotations

import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import RunUnfinished
from pipeline.submission import (
    PATIENCE_S,
    POLL_S,
    REACH_S,
    Job,
    Unreachable,
    entrypoint,
    exit_code,
    followed,
    patiently,
    stem,
    submitted,
    verdict,
)
from tests.schedules import Clock, JobServer

JOB = ("segment", ("s3://b/in", "--out", "s3://b/out dir"))


@pytest.fixture
def server():
    return JobServer()


@pytest.fixture
def said():
    return []


@pytest.fixture
def follow(server, said):
    """Follow a job to its end without losing time; its log and how it ended."""

    def called(job_id, patience_s=PATIENCE_S):
        clock, written = Clock(), []
        job = followed(
            server, job_id, written.append, said.append, patience_s, clock.sleep, clock.monotonic
        )
        return "".join(written), job

    return called


@pytest.fixture
def submit(server, said):
    """Submit a job without losing time."""
    return lambda command=JOB[0], arguments=JOB[1]: submitted(
        server, command, arguments, {}, said.append, Clock().sleep
    )


# -- what it is called ---------------------------------------------------------------------------


def test_the_drivers_command_survives_a_shell():
    words = shlex.split(entrypoint("segment", ("a b", "$HOME; rm -rf /", "'")))
    assert words == ["python", "-m", "jobs.segment", "a b", "$HOME; rm -rf /", "'"]


def test_every_word_of_a_job_counts_for_its_name():
    names = {stem("status", words) for words in [(), ("a",), ("a b",), ("a", "b"), ("ab",)]}
    assert len(names | {stem("verify", ())}) == 6


def test_the_same_job_is_found_while_it_runs_and_numbered_up_once_it_is_over(server, submit):
    first, new = submit()
    assert new
    assert submit() == (first, False)
    server.end(first, "FAILED", 4)
    again, new = submit()
    assert new
    assert (again[:-1], again[-1]) == (first[:-1], "2")
    assert submit("segment", ("other",))[0] != again


def test_of_submitters_at_once_the_cluster_takes_one(server, submit):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: submit(), range(8)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1
    assert len(server.taken) == 1


def test_a_submission_whose_answer_was_lost_is_not_made_twice(server, submit):
    server.lost_answers = 1
    job_id, _ = submit()
    assert server.taken == [job_id]


def test_a_submission_whose_answer_was_lost_is_not_made_twice_even_if_it_is_over(server, submit):
    server.lost_answers = 1
    known = server.submit

    def quickly(job_id, *more):
        try:
            return known(job_id, *more)
        finally:
            server.end(job_id, "SUCCEEDED", 0)

    server.submit = quickly
    job_id, _ = submit()
    assert server.taken == [job_id]


# -- how it ended --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "error", "ours"),
    [
        ("SUCCEEDED", 0, "", 0),
        ("FAILED", 3, "JOB_ENTRYPOINT_COMMAND_ERROR", 3),
        ("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR", 1),
        ("FAILED", 5, "", 5),
        ("FAILED", 137, "", 4),
        ("FAILED", -9, "", 4),
        ("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED", 4),
        ("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE", 2),
        ("STOPPED", None, "", 4),
    ],
)
def test_the_exit_code_is_the_drivers_or_says_what_to_do(status, code, error, ours):
    job = Job("mf-1", status, "python -m jobs.status", code, error)
    assert exit_code(job) == ours
    assert f"exit code {ours}" in verdict(job)


# -- follow --------------------------------------------------------------------------------------


def running(server, submit, text, polls=3):
    """A job with this log that ends with 3 when it has been asked for so often."""
    job_id, _ = submit()
    server.logs[job_id] = text
    left = [polls]

    def polled(asked):
        left[0] -= 1
        if left[0] == 0:
            server.end(asked, "FAILED", 3)

    server.polled = polled
    return job_id


TEXT = "".join(f"line {n}: ä€\n" for n in range(50))


def test_the_whole_log_is_written_and_the_end_is_the_drivers(server, submit, follow):
    written, job = follow(running(server, submit, TEXT))
    assert written == TEXT
    assert exit_code(job) == 3


@pytest.mark.parametrize("breaks", [[0], [1, 40, 3], [7] * 10, [10_000]])
def test_a_connection_that_breaks_repeats_and_loses_nothing(server, submit, follow, breaks):
    server.breaks = breaks
    written, _ = follow(running(server, submit, TEXT, polls=8))
    assert written == TEXT


def test_a_head_that_is_away_for_a_while_is_waited_for(server, submit, follow, said):
    job_id = running(server, submit, TEXT)
    server.outages = int(PATIENCE_S / POLL_S) - 5
    written, job = follow(job_id)
    assert (written, exit_code(job)) == (TEXT, 3)
    assert len(said) == 1
    assert "does not answer" in said[0]


def test_a_head_that_is_away_for_too_long_is_given_up_resumably(server, submit, follow):
    job_id = running(server, submit, TEXT)
    server.outages = 10_000
    with pytest.raises(RunUnfinished, match="gave up after 60 s"):
        follow(job_id, 60.0)


def test_a_cluster_that_forgot_the_job_says_that_it_can_go_on(server, submit, follow):
    job_id = running(server, submit, TEXT)
    server.known.clear()
    with pytest.raises(RunUnfinished, match="no longer knows"):
        follow(job_id)


def test_an_end_is_told_even_if_the_logs_last_lines_cannot_be_had(server, submit, follow, said):
    job_id = running(server, submit, TEXT, polls=1)

    def gone(asked):
        raise Unreachable("http://head:8265 does not answer")

    server.log = gone
    _, job = follow(job_id)
    assert exit_code(job) == 3
    assert "the end of the log is missing" in said[-1]


def test_patience_is_counted_from_the_first_silence():
    clock, asked = Clock(), []

    def silent():
        asked.append(clock.monotonic())
        raise Unreachable("no answer")

    with pytest.raises(Unreachable):
        patiently(silent, REACH_S, lambda text: None, clock.sleep, clock.monotonic)
    assert asked[-1] >= REACH_S
    assert len(asked) == REACH_S / POLL_S + 1
