"""A folder whose n-th request goes wrong, in each of the ways in which a store goes wrong."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.errors import StorageBusy, StorageDenied
from pipeline.storage import LocalStore

Way = Literal["busy", "denied", "lost", "twice", "short", "flip", "killed_before", "killed_after"]
WRITES = ("create", "replace", "delete")
REQUESTS = ("list", "read", "stat", *WRITES)
OF_READS: tuple[Way, ...] = ("short", "flip")


class Killed(BaseException):
    """What a SIGKILL would be, if it could be raised."""


BEFORE: dict[Way, BaseException] = {
    "busy": StorageBusy("503 Slow Down"),
    "denied": StorageDenied("403 Forbidden"),
    "killed_before": Killed(),
}
AFTER: dict[Way, BaseException] = {
    "lost": StorageBusy("connection reset"),
    "killed_after": Killed(),
}


@dataclass
class Faults:
    """What has been asked of a folder, and what went wrong."""

    asked: list[str] = field(default_factory=list)
    """`read run.json` and so on, in order."""
    dead: bool = False
    """Nothing is answered any more."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def faulty(
    root: Path, call: int, way: Way, requests: tuple[str, ...] = REQUESTS
) -> Iterator[Faults]:
    """Let the so-manieth request (from 1; -1: none) to the folder go wrong.

    busy: refused for a while; denied: for good; lost: done, but the answer is lost; twice: done
    twice; short: half of the bytes; flip: one bit is another; killed_before, killed_after: the
    process dies there.
    """
    faults = Faults()
    originals = {name: getattr(LocalStore, name) for name in requests}

    def wrapped(name: str) -> Callable[..., Any]:
        def request(store: LocalStore, *about: Any, **more: Any) -> Any:
            def do() -> Any:
                made = originals[name](store, *about, **more)
                return iter(list(made)) if name == "list" else made  # now, not when it is read

            if store.root != root:
                return do()
            with faults.lock:
                if faults.dead:
                    raise Killed
                faults.asked.append(f"{name} {about[0] if about else ''}")
                wrong = len(faults.asked) == call
                faults.dead = wrong and way.startswith("killed")
            return _gone_wrong(way, do) if wrong else do()

        return request

    with pytest.MonkeyPatch.context() as patch:
        for name in originals:
            patch.setattr(LocalStore, name, wrapped(name))
        yield faults


def _gone_wrong(way: Way, do: Callable[[], Any]) -> Any:
    if way in BEFORE:
        raise BEFORE[way]
    answer = do()
    if way in AFTER:
        raise AFTER[way]
    if way == "twice":
        do()
    if not isinstance(answer, bytes) or way not in OF_READS:
        return answer
    middle, changed = len(answer) // 2, bytearray(answer)
    if way == "short":
        return answer[:middle]
    if answer:
        changed[middle] ^= 4
    return bytes(changed)
