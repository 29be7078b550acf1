"""A model is probed in a process of its own: the same answer, and no end that hangs."""

import os
import signal

import pytest

from pipeline import probing
from pipeline.config import from_mapping
from pipeline.errors import RunRefused, RunUnfinished
from pipeline.here import Here
from pipeline.probing import probed
from tests.bundles import files_of

LONG = 100.0


@pytest.fixture
def config():
    return from_mapping({"source": "/in", "out": "/out"})


@pytest.fixture
def processes(monkeypatch):
    """The children that were started."""
    started = []

    def noticed(*about):
        process, channel = start(*about)
        started.append(process)
        return process, channel

    start = probing.spoken_with
    monkeypatch.setattr(probing, "spoken_with", noticed)
    return started


def test_it_finds_what_this_process_finds(tiny_bundle, config, processes):
    bundle = files_of(tiny_bundle)

    with probed(bundle, config) as answer:
        found = answer(LONG)

    assert found == Here(config.compute).found(bundle, 10, config)
    assert processes[0].returncode is not None


def test_a_bundle_that_cannot_be_used_is_refused_as_here(tiny_bundle, config):
    card, weights = files_of(tiny_bundle)
    with probed((card, weights[:-4]), config) as answer, pytest.raises(RunRefused) as there:
        answer(LONG)

    with pytest.raises(RunRefused) as here:
        Here(config.compute).found((card, weights[:-4]), 10, config)
    assert str(there.value) == str(here.value)


def test_a_process_that_ends_leaves_the_run_unfinished(tiny_bundle, config, processes):
    with probed(files_of(tiny_bundle), config) as answer:
        os.kill(processes[0].pid, signal.SIGKILL)
        with pytest.raises(RunUnfinished, match=r"ended \(exit -9\); did it lack memory"):
            answer(LONG)


def test_a_process_that_is_silent_is_not_waited_for_longer_than_told(
    tiny_bundle, config, processes
):
    with probed(files_of(tiny_bundle), config) as answer:
        os.kill(processes[0].pid, signal.SIGSTOP)
        with pytest.raises(RunUnfinished, match=r"not probed after 0.2 s"):
            answer(0.2)
    assert processes[0].returncode == -signal.SIGKILL


def test_it_ends_when_nobody_asks_any_more(tiny_bundle, config, processes):
    with pytest.raises(ZeroDivisionError), probed(files_of(tiny_bundle), config):
        raise ZeroDivisionError
    assert processes[0].returncode is not None
