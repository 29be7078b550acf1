"""One piece of work in a process of its own: its seconds, CPU seconds, peak memory, requests.

    python -m benchmarks.measured WORK ARGUMENTS...

`cost_of` starts such a process. Requests are counted at the stores' methods, a listing as one for
every thousand names, as S3 would answer it. Times begin with the process: imports are part of it.
"""

import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

PAGE = 1000  # names of one answer to a listing
METHODS = ("read", "stat", "create", "replace", "delete")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a piece of work took."""

    seconds: float
    cpu: float
    """Seconds, user and system, of that process (not of Ray's workers)."""
    peak_mb: float
    """The most resident memory."""
    requests: dict[str, int]
    said: dict[str, Any]
    """What the work itself has to tell."""


def cost_of(work: str, *arguments: object) -> Cost:
    """Do a piece of work in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.measured", work, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{work} {arguments}: {done.stderr[-2000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return Cost(said.pop("seconds", seconds), **said)


# ----------------------------------------------------------------------------- in the process


def counted(counts: Counter[str]) -> None:
    """Count every request of this process from now on."""
    from pipeline.storage import LocalStore, S3Store

    def counting(method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def wrapped(*given: Any, **named: Any) -> Any:
            counts[method] += 1
            return call(*given, **named)

        return wrapped

    def paged(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def wrapped(*given: Any, **named: Any) -> Iterator[Any]:
            for number, found in enumerate(call(*given, **named)):
                counts["list"] += number % PAGE == 0
                yield found

        return wrapped

    for store in (LocalStore, S3Store):
        for method in METHODS:
            setattr(store, method, counting(method, getattr(store, method)))
        store.list = paged(store.list)


def with_ready_listings() -> None:
    """Let ``s3://ready-listing/N`` be a bucket of N pictures (`synthetic.Ready`)."""
    from pipeline import storage

    usual = storage.open_store

    def opened(uri: str) -> Any:
        from benchmarks.synthetic import READY, Ready

        return Ready(int(uri.removeprefix(READY))) if uri.startswith(READY) else usual(uri)

    storage.open_store = opened


def peak_mb() -> float:
    """The most memory this process has had."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmHWM"))


def command(*words: str) -> dict[str, Any]:
    """`maskfleet WORDS...`."""
    from jobs.__main__ import main

    sys.argv = ["maskfleet", *words]
    return {"exit_code": main(), "torch": "torch" in sys.modules}


def until_work(*words: str) -> dict[str, Any]:
    """`maskfleet WORDS...`, stopped when the first fragment would be begun."""
    from pipeline.errors import RunUnfinished

    said: dict[str, Any] = {}

    def heard(record: logging.LogRecord) -> bool:
        if "fragments to do" in record.getMessage():
            said.update(seconds=time.monotonic() - STARTED, peak_mb=peak_mb(), cpu=cpu())
            raise RunUnfinished("measured")
        return True

    logging.getLogger("maskfleet").addFilter(heard)
    return {**said, **command(*words)}


def plan(source: str, out: str) -> dict[str, Any]:
    """List and plan a whole archive, without a model."""
    from benchmarks.synthetic import Pretended
    from pipeline.archive import segment_archive
    from pipeline.errors import RunUnfinished

    stop = threading.Event()
    stop.set()
    try:
        segment_archive(_config(source, out), Pretended(_config(source, out).compute), stop)
    except RunUnfinished:
        return {}
    raise AssertionError


def answer(source: str, out: str) -> dict[str, Any]:
    """Commit every fragment of a plan; finish the run."""
    from benchmarks.synthetic import Pretended
    from pipeline.archive import segment_archive

    config = _config(source, out)
    outcome = segment_archive(config, Pretended(config.compute), threading.Event())
    return {"counts": outcome.receipt["counts"]}


def _config(source: str, out: str) -> Any:
    from pipeline.config import from_mapping

    return from_mapping({"source": source, "out": out, "log": "text"})


def finish(out: str) -> dict[str, Any]:
    """Make the final tables of a run whose fragments are committed."""
    from pipeline.finalize import finalize
    from pipeline.ledger import Ledger
    from pipeline.storage import open_store

    finalize(Ledger.open(open_store(out)))
    return {}


def report(out: str) -> dict[str, Any]:
    """Open a run; the pictures with more than a fraction of a class; one mask by key."""
    import pyarrow.compute as pc

    from pipeline import open_run

    run = open_run(out)
    stats = run.class_stats
    much = stats.filter(pc.and_(pc.equal(stats["class_id"], 1), pc.greater(stats["fraction"], 0.3)))
    images = run.images
    found = pc.is_in(images["image_id"], much["image_id"].combine_chunks())
    keys = images["key"].filter(found)
    mask = run.mask(keys[len(keys) // 2].as_py())
    return {"rows": len(keys), "shape": mask.shape}


def index(source: str) -> dict[str, Any]:
    """Plan an archive in memory, write nothing."""
    from pipeline.known import Known
    from pipeline.listing import Listing
    from pipeline.plan import Start, plan_round
    from pipeline.storage import open_store

    config = _config(source, "/nowhere")
    made = plan_round(open_store(source), config, Listing(), Known(), Start())
    return {"images": made.images}


WORKS = {work.__name__: work for work in (command, until_work, plan, answer, finish, report, index)}


def cpu() -> float:
    """CPU seconds of this process."""
    return time.process_time()


STARTED = time.monotonic()


def main() -> None:
    """Do one piece of work and print what it cost."""
    counts: Counter[str] = Counter()
    counted(counts)
    with_ready_listings()
    work, *arguments = sys.argv[1:]
    stdout, sys.stdout = sys.stdout, sys.stderr
    said = WORKS[work](*arguments)
    cost = {"cpu": cpu(), "peak_mb": peak_mb()}
    cost |= {name: said.pop(name) for name in ("cpu", "peak_mb", "seconds") if name in said}
    print(json.dumps({**cost, "requests": counts, "said": said}), file=stdout)


if __name__ == "__main__":
    main()
