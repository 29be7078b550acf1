"""Real runs of the real command, each in a process that can be killed, and what they made.

A driver costs a fork, not an import of torch: `multiprocessing`'s fork server has everything
imported. A driver on Ray is a plain subprocess instead; threads of grpc and forks do not mix.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from jobs.segment import main
from pipeline.errors import EXIT_REJECTIONS
from pipeline.ledger import Ledger
from pipeline.reader import open_run
from pipeline.storage import open_store
from pipeline.verify import verify

ROOT = Path(__file__).parents[1]
PATIENCE_S = 100.0  # a Ray of its own takes 40 s to its first fragment where others want its cores
SMALL = ("--fragment.images", "8", "--compute.workers", "2")
"""Fragments so small that a run has many, on both cores of the smallest machine."""

_nursery = multiprocessing.get_context("forkserver")
_nursery.set_forkserver_preload(["tests.runs", "pipeline.infer", "models.latent_attention", "s3fs"])


def words(source: Path | str, run: Path | str, bundle: Path, *more: str) -> list[str]:
    """The command line of a run in small fragments."""
    return [str(source), "--out", str(run), "--model", str(bundle), *SMALL, *more]


# -- drivers -------------------------------------------------------------------------------------


class Driver:
    """`maskfleet segment` in a process of its own, forked from one that has everything imported."""

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        before: Callable[..., None] | None = None,
        *arguments: object,
    ) -> None:
        self.log = log
        # the fork server has the environment of its own start: send today's along
        own = {**os.environ, **(environment or {})}
        self._process: BaseProcess = _nursery.Process(
            target=_drive, args=(list(words), str(log), own, before, arguments)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self._process.kill()
        assert self.wait() == -signal.SIGKILL, self.said

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """The exit code; minus the signal that ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"no end after {seconds} s:\n{self.said}"
        return self._process.exitcode

    @property
    def said(self) -> str:
        """Everything it wrote to stdout and stderr."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _drive(
    words: list[str],
    log: str,
    environment: dict[str, str],
    before: Callable[..., None] | None,
    arguments: tuple[object, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if before is not None:
        before(*arguments)
    code = main(words)
    sys.stdout.flush()
    os._exit(code)  # as a command would end: without multiprocessing's own goodbyes


@contextmanager
def driver(*arguments: Any, **named: Any) -> Iterator[Driver]:
    """A driver that does not outlive the test."""
    started = Driver(*arguments, **named)
    try:
        yield started
    finally:
        started.close()


@contextmanager
def command(
    words: Sequence[str],
    *,
    job: str = "segment",
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Command]:
    """`python -m jobs.segment …` as a person starts it; what is left of it ends with the test."""
    started = Command(
        [sys.executable, "-m", f"jobs.{job}", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.ended()


class Command(subprocess.Popen[str]):
    """A command's process; `out` and `err` are there once it has ended."""

    out = err = ""

    def ended(self, seconds: float = 2 * PATIENCE_S) -> int:
        """The exit code."""
        if not self.stdout.closed:
            self.out, self.err = self.communicate(timeout=seconds)
        return self.returncode


def on_ray(words: Sequence[str], address: str, **named: Any) -> Command:
    """Run a driver on a cluster to its end, which is the same as everywhere."""
    with command([*words, "--on", address], **named) as driver:
        assert driver.ended() == EXIT_REJECTIONS, driver.out + driver.err
        return driver


def until_actor(driver: Command, *above: int) -> None:
    """Return when a model is loaded below one of these processes; fail if the driver ends first."""
    until(lambda: actors(*above) or driver.poll() is not None, "an actor")
    assert driver.poll() is None, driver.ended() and driver.out + driver.err


def actors(*above: int) -> list[psutil.Process]:
    """The processes below these that hold a model."""
    return [process for process, title in _titled(*above) if "(_Worker)" in title]


def tasks(*above: int) -> list[psutil.Process]:
    """The processes below these that fetch for an actor just now; beside GPUs only."""
    return [process for process, title in _titled(*above) if "(_load)" in title]


def _titled(*above: int) -> Iterator[tuple[psutil.Process, str]]:
    """The processes below these, and their command lines; some end while one looks."""
    for pid in above:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    yield process, " ".join(process.cmdline())


def until(
    condition: Callable[[], object], what: str, seconds: float = PATIENCE_S, every: float = 0.005
) -> None:
    """Return when it holds; fail with what was waited for after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(every)


# -- dying on cue --------------------------------------------------------------------------------

STEPS = ("fsync", "link", "replace", "unlink")
"""The calls a local write consists of; between any two of them a process may die."""


def signal_at_step(number: int, what: signal.Signals = signal.SIGKILL) -> None:
    """Signal this process just before its so-manieth step of a write, counted from 1."""
    count = 0

    def heard(name: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            signal.pthread_kill(threading.get_ident(), what)  # this thread goes no further

    _listen(heard)


def signal_before(call: str, ending: str, what: signal.Signals) -> None:
    """Signal this process once, just before it makes this call on a path with such an ending."""
    spent = False

    def heard(name: str, path: str) -> None:
        nonlocal spent
        if name == call and path.endswith(ending) and not spent:
            spent = True
            signal.pthread_kill(threading.get_ident(), what)  # this thread goes no further

    _listen(heard)


def hang_before(call: str, ending: str) -> None:
    """Let the call never come back, and with it no later step of any thread."""

    def heard(name: str, path: str) -> None:
        if name == call and path.endswith(ending):
            threading.Event().wait()

    _listen(heard)


def record_steps(report: str) -> None:
    """Append a line per step of a write to a file."""

    def heard(name: str, path: str) -> None:
        with open(report, "a") as file:  # noqa: PTH123
            file.write(f"{name} {path}\n")

    _listen(heard)


def _listen(heard: Callable[[str, str], None]) -> None:
    lock = threading.Lock()

    def telling(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **named: Any) -> Any:
            with lock:
                heard(name, str(arguments[-1]))  # of two paths, the one that will be there
            return call(*arguments, **named)

        return told

    for name in STEPS:
        setattr(os, name, telling(name, getattr(os, name)))


# -- what a run holds ----------------------------------------------------------------------------


def commits(run: Path | str) -> dict[int, str]:
    """Writer tokens of the committed fragments."""
    ledger = Ledger.find(open_store(str(run)))
    if ledger is None or not ledger.rounds():
        return {}
    return {
        c.fragment: h.about["token"] for c, h in ledger.headers(list(ledger.commits().values()))
    }


def committed(run: Path) -> int:
    """How many fragments of a local run are committed: cheap enough to poll."""
    folders = [run / "masks.zarr/mask/c", run / "predictions/c"]  # of a classifier: the other one
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return len([path for path in found if not path.name.startswith(".")])


def rework(run: Path) -> int:
    """How many times work on a fragment of a local run was begun beyond the one that made it."""
    begun = sum(1 for path in (run / "attempts").rglob("*") if path.is_file())
    return begun - len(commits(run))


def this_call(run: Path | str) -> dict[str, Any]:
    """What the receipt says of the newest call."""
    return json.loads(open_store(str(run)).read("receipt.json"))["this_call"]


IN_OBJECTS = ["byte_offset", "byte_nbytes"]
OF_ATTEMPTS = ["token", "etag", "nbytes", "header_nbytes", "data_crc32c"]
"""Headers hold token and time, so their lengths differ, and all places behind them."""


def content(run: Path | str, without: Sequence[str] = ()) -> dict[str, Any]:
    """What makes two runs equal: decoded masks or predictions, and rows less tokens, times and
    these columns."""
    read = open_run(str(run))
    with read.ledger.plan_file("final/fragments.parquet") as file:
        fragments = pq.read_table(file).drop_columns(OF_ATTEMPTS)
    images = read.images.drop_columns(IN_OBJECTS).to_pylist()
    parts = {
        "images": images,
        "class_stats": read.class_stats.to_pylist(),
        "rejected": read.rejected.to_pylist(),
        "fragments": fragments.to_pylist(),
    }
    if read.ledger.layout.has_masks:
        masks = {row["key"]: read.mask(row["key"]) for row in images if row["status"] == "done"}
        parts["masks"] = {key: (mask.shape, mask.tobytes()) for key, mask in masks.items()}
    else:
        parts["predictions"] = read.predictions.to_pylist()
    return {name: less(rows, without) for name, rows in parts.items()}


def less(rows: Any, without: Sequence[str]) -> Any:
    """The same rows without these columns."""
    if isinstance(rows, dict):
        return rows
    return [{name: v for name, v in row.items() if name not in without} for row in rows]


def assert_sound(run: Path | str) -> None:
    """`maskfleet verify` finds nothing wrong and nothing pending."""
    found = verify(Ledger.open(open_store(str(run))))
    assert found.problems == []
    assert found.pending == 0


def assert_same(run: Path | str, oracle: Mapping[str, Any], without: Sequence[str] = ()) -> None:
    """The run is sound and equals the undisturbed one, less these columns."""
    assert_sound(run)
    mine = content(run, without)
    for name, theirs in oracle.items():
        assert mine[name] == less(theirs, without), f"{name} differ"


def assert_went_on(run: Path | str, before: Mapping[int, str], oracle: Mapping[str, Any]) -> None:
    """What was committed before is what it was, the last call made the rest alone, and the run is
    the undisturbed one."""
    assert before.items() <= commits(run).items()
    assert this_call(run)["fragments"] == len(oracle["fragments"]) - len(before)
    assert_same(run, oracle)


def finished(words: Sequence[str], log: Path, code: int = EXIT_REJECTIONS) -> str:
    """Run a driver to its end; returns what it said."""
    with driver(words, log) as started:
        assert started.wait() == code, started.said
        return started.said
