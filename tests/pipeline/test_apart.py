"""A child process that reads a file: what it says, how it ends, and what that costs."""

import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from pipeline import apart
from pipeline.apart import ProcessDied, answers
from pipeline.config import from_mapping
from pipeline.errors import RunUnfinished, StorageBusy
from pipeline.ranged import Ranged
from pipeline.run import load
from pipeline.storage import LocalStore
from tests import runs
from tests.contracts.formats import planned
from tests.pictures import parquet_of
from tests.readers import (
    aborts,
    eats,
    environment,
    fails,
    hangs,
    many,
    modules,
    naps,
    refuses,
    who,
    words,
)

ROOT = Path(__file__).parents[2]
WORDS = b"one two three"


@pytest.fixture(autouse=True)
def _no_idle_children():
    apart._end_all()


@pytest.fixture
def file(tmp_path):
    (tmp_path / "words").write_bytes(WORDS)
    return Ranged(LocalStore(tmp_path), "words", len(WORDS), None)


def test_a_child_reads_the_file_through_its_parent_and_answers_in_order(file):
    assert list(answers(file, words, 1, "b")) == [b"one", b"two", b"three", [1, "b"]]


def test_one_child_serves_one_file_after_the_other_and_two_at_a_time_have_two(file):
    (first,), (second,) = answers(file, who), answers(file, who)
    assert first == second != os.getpid()

    both = [answers(file, who) for _ in range(2)]
    assert len({next(each) for each in both}) == 2
    for each in both:
        each.close()


def test_a_child_that_dies_says_what_it_had_and_the_next_one_goes_on(file):
    dying = answers(file, aborts, 3)
    assert [next(dying) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ProcessDied, match=r"ended its reader's process \(exit -6\)") as death:
        next(dying)

    assert not death.value.late
    assert b"one" in list(answers(file, words))


def test_a_child_that_hangs_is_ended_by_the_kernel_and_said_to_be_late(file, monkeypatch):
    monkeypatch.setattr(apart, "PATIENCE_S", 1)

    with pytest.raises(ProcessDied, match="still busy after 1 s") as death:
        list(answers(file, hangs))

    assert death.value.late


class Slow(LocalStore):
    def read(self, path, start=0, length=None, etag=None):
        time.sleep(1.5)
        return super().read(path, start, length, etag)


def test_a_child_that_waits_for_its_parent_is_not_late(tmp_path, file, monkeypatch):
    monkeypatch.setattr(apart, "PATIENCE_S", 1)

    slow = Ranged(Slow(tmp_path), "words", len(WORDS), None)
    assert list(answers(slow, naps, 0.3)) == [b"one", b"two", b"thr"]

    heard = 0
    for said in answers(file, many, 20):
        heard += len(said)
        time.sleep(1.5 if heard == 100_000 else 0)  # a channel holds less than what is said
    assert heard == 2_000_000


def test_a_child_that_wants_too_much_memory_says_so_by_its_end(file):
    with pytest.raises(ProcessDied, match="its reader wants more than 8192 MB"):
        list(answers(file, eats))
    assert b"one" in list(answers(file, words))


def test_what_the_work_refuses_is_a_value_error_and_what_it_gets_wrong_a_bug(file):
    with pytest.raises(ValueError, match="not like this"):
        list(answers(file, refuses))
    with pytest.raises(RuntimeError, match=r"(?s)in a child process.*no_such_thing"):
        list(answers(file, fails))
    assert b"one" in list(answers(file, words))


class Down(LocalStore):
    def read(self, path, start=0, length=None, etag=None):
        raise StorageBusy("the store is down")


def test_a_store_that_fails_is_the_parents_error_and_costs_the_child(tmp_path, file):
    (before,) = answers(file, who)

    with pytest.raises(StorageBusy, match="the store is down"):
        list(answers(Ranged(Down(tmp_path), "words", len(WORDS), None), words))

    assert not psutil.pid_exists(before)
    assert b"one" in list(answers(file, words))


def test_who_listens_no_more_leaves_no_child_behind(file):
    listening = answers(file, hangs)
    assert next(listening) == "begun"
    (child,) = [p for p in psutil.Process().children() if "pipeline.apart" in p.cmdline()]

    listening.close()

    assert not child.is_running()


def test_idle_children_that_died_meanwhile_are_not_asked(file):
    both = [answers(file, who) for _ in range(2)]
    pids = [next(each) for each in both]
    assert [list(each) for each in both] == [[], []]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT  # a zombie's other threads may be alive yet
    runs.until(lambda: all(os.waitid(os.P_PID, pid, ended) for pid in pids), "their end", 5)

    assert b"one" in list(answers(file, words))


def test_a_child_that_dies_in_the_middle_of_a_message_has_died(file):
    talking = answers(file, many, 400)
    next(talking)
    (child,) = [p for p in psutil.Process().children() if "pipeline.apart" in p.cmdline()]
    time.sleep(0.2)  # it is stuck in a message, for the channel is full
    child.kill()

    with pytest.raises(ProcessDied, match=r"exit -9"):
        list(talking)


def test_a_child_that_cannot_start_is_nothing_that_a_file_has_done(file, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(5)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    with pytest.raises(RunUnfinished, match=r"ended before it could begin \(exit 5\)"):
        list(answers(file, words))


def test_under_a_limit_of_the_operator_a_child_starts(file):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    read, write = os.pipe()
    if not (forked := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (6 * 1024**3, 6 * 1024**3))
        os.write(write, b"".join(list(answers(file, words))[:3]))
        apart._end_all()
        os._exit(0)
    os.waitpid(forked, 0)

    assert os.read(read, 100) == b"onetwothree"
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_AS)


def test_a_child_learns_nothing_that_opens_a_store(file, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary")

    (known,) = answers(file, environment)

    assert "canary" not in known.values()
    assert set(known) <= {*apart.KNOWN, "LC_CTYPE"}


def test_a_child_runs_nothing_of_the_folder_it_is_called_in(file, monkeypatch, tmp_path):
    for name in ("resource.py", "pipeline.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)

    (path,) = answers(file, modules)

    assert not {"", ".", str(tmp_path)} & set(path)


def test_the_load_leg_leaves_its_child_for_the_next_fragment(tmp_path):
    (tmp_path / "t.parquet").write_bytes(parquet_of([WORDS] * 3))
    store = LocalStore(tmp_path)
    config = from_mapping({"source": store.uri, "out": "/nowhere"})
    line = types.SimpleNamespace(source=store, config=config)
    images = planned(store)

    for _ in range(2):
        assert [item.data for item in load(images, line)] == [WORDS] * 3

    assert len(apart._idle[os.getpid()]) == 1


def test_a_forked_process_has_children_of_its_own(file):
    (ours,) = answers(file, who)
    read, write = os.pipe()
    if not (forked := os.fork()):
        (theirs,) = answers(file, who)
        os.write(write, str(theirs).encode())
        apart._end_all()
        os._exit(0)
    os.waitpid(forked, 0)

    assert int(os.read(read, 100)) != ours
    assert list(answers(file, who)) == [ours]


PARENT = """
import sys, time
from pathlib import Path
from pipeline.apart import answers
from pipeline.ranged import Ranged
from pipeline.storage import LocalStore
from tests.readers import who
file = Ranged(LocalStore(Path(sys.argv[1])), "words", 13, None)
if sys.argv[2] == "idle":
    print(*answers(file, who), flush=True)
    time.sleep(600)
kept = answers(file, who)
print(next(kept), flush=True)
if sys.argv[2] == "busy":
    time.sleep(600)
"""


@pytest.mark.parametrize("end", ["idle", "busy", "done"])
def test_a_child_ends_with_its_parent(tmp_path, file, end):
    parent = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PARENT, tmp_path, end],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    child = int(parent.stdout.readline())
    if end != "done":
        parent.send_signal(signal.SIGKILL)
    _, said = parent.communicate(timeout=30)

    runs.until(lambda: not psutil.pid_exists(child), "the child to end", 10)
    assert (said, parent.returncode) == ("", 0 if end == "done" else -signal.SIGKILL)
