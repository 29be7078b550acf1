"""A model is probed in a process of its own: the same answer, and no end that hangs."""

import os
import signal
import threading

import pytest

from pipeline import probing as module
from pipeline.config import from_mapping
from pipeline.errors import RunRefused, RunUnfinished
from pipeline.here import Here
from pipeline.probing import probing
from tests.bundles import files_of


def config(no_progress_s=100.0):
    compute = {"no_progress_s": no_progress_s}
    return from_mapping({"source": "/in", "out": "/out", "compute": compute})


@pytest.fixture
def processes(monkeypatch):
    """The children that were started."""
    started = []

    def noticed(*about):
        process, channel = start(*about)
        started.append(process)
        return process, channel

    start = module.spoken_with
    monkeypatch.setattr(module, "spoken_with", noticed)
    return started


def test_it_finds_what_this_process_finds(tiny_bundle, processes):
    bundle = files_of(tiny_bundle)

    with probing() as found:
        there = found(bundle, config())

    assert there == Here(config().compute).found(bundle, 10, config())
    assert processes[0].returncode is not None


def test_a_bundle_that_cannot_be_used_is_refused_as_here(tiny_bundle):
    card, weights = files_of(tiny_bundle)
    with probing() as found, pytest.raises(RunRefused) as there:
        found((card, weights[:-4]), config())

    with pytest.raises(RunRefused) as here:
        Here(config().compute).found((card, weights[:-4]), 10, config())
    assert str(there.value) == str(here.value)


def test_a_process_that_ends_leaves_the_run_unfinished(tiny_bundle, processes):
    with probing() as found:
        os.kill(processes[0].pid, signal.SIGKILL)
        with pytest.raises(RunUnfinished, match=r"ended \(exit -9\); did it lack memory"):
            found(files_of(tiny_bundle), config())


def test_a_process_that_is_silent_is_not_waited_for_longer_than_told(tiny_bundle, processes):
    card, weights = files_of(tiny_bundle)
    weights += b"0" * 10_000_000  # more than a channel holds
    threads = threading.active_count()
    with probing() as found:
        os.kill(processes[0].pid, signal.SIGSTOP)
        with pytest.raises(RunUnfinished, match="not probed after 5 s"):
            found((card, weights), config(no_progress_s=5.0))
    assert processes[0].returncode == -signal.SIGKILL
    assert threading.active_count() == threads  # none writes into a channel that is closed


def test_it_ends_when_nobody_asks_any_more(processes):
    with pytest.raises(ZeroDivisionError), probing():
        raise ZeroDivisionError
    assert processes[0].returncode is not None


def test_where_no_process_can_be_started_the_run_is_unfinished(monkeypatch):
    def full(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(module, "spoken_with", full)
    with pytest.raises(RunUnfinished, match="no more processes"), probing():
        pass
