"""Pictures that do something to whoever decodes or predicts them, as a bug in a library would.

The last bytes of a file say what. A driver of `tests/runs.py` calls `spread` or `spread_further`
itself; every other Python process of a run does by `sitecustomize`, which Python imports at start.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
DELAY_S = 0.2  # decoding and predicting begin long before they go wrong
EATEN = 1 << 30
HANGING = "MASKFLEET_TESTS_HANGING"  # names the folder where a process that hangs leaves its number


def kill() -> None:
    os.abort()


def hang() -> None:
    Path(os.environ[HANGING], str(os.getpid())).touch()
    time.sleep(3600)


def eat() -> None:
    """More memory than a careful child may have; where nothing bounds it the kernel does."""
    kept = bytearray(EATEN)  # raises MemoryError in a child
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY, len(kept)
    os.kill(os.getpid(), signal.SIGKILL)


def gulp() -> None:
    """So much memory that is really used: what the kernel bounds, it kills."""
    assert len(b"\1" * EATEN) == EATEN


def fail() -> None:
    raise ZeroDivisionError("a bug")


def lack() -> None:
    raise MemoryError("asked for too much")


DEEDS = {
    b"KILL": kill,
    b"HANG": hang,
    b"EATS": eat,
    b"GULP": gulp,
    b"FAIL": fail,
    b"LACK": lack,
}


def poison(station: str, deed: bytes, picture: bytes) -> bytes:
    """A picture that does this when it is read from a table, decoded, or predicted."""
    assert deed in DEEDS
    return picture + station.encode() + b":" + deed


def spread() -> None:
    """Let this process fall for what is decoded, and for what a child reads from a table."""
    import pipeline.foreign_table as table
    import pipeline.pictures as station

    real, whole = station.decode, table._cell

    def cell(value, limit):
        data = whole(value, limit)
        if isinstance(data, bytes):
            _suffer("read", data)
        return data

    def decode(data, *how):
        pixels = real(data, *how)
        _suffer("decode", data)
        return pixels

    station.decode, table._cell = decode, cell


def spread_further() -> None:
    """Let it fall for what is predicted, too; imports torch."""
    import pipeline.pictures as pictures
    from pipeline.infer import Segmenter

    spread()
    ends: dict[str, bytes] = {}
    decoded, real = pictures._decoded, Segmenter._run

    def remembered(item, **how):
        ends[item.plan.key] = item.data[-16:]
        return decoded(item, **how)

    def run(self, tiles, *arguments, **named):
        for tile in tiles:
            _suffer("predict", ends.get(tile.picture.plan.key, b""))
        return real(self, tiles, *arguments, **named)

    pictures._decoded, Segmenter._run = remembered, run


def waver() -> None:
    """Let a model give another answer each time; imports torch."""
    import torch

    from pipeline.infer import Segmenter

    real = Segmenter._finish

    def finish(self, scores_Khw, *arguments):
        noise_Khw = torch.from_numpy(np.random.default_rng().normal(size=scores_Khw.shape))
        return real(self, scores_Khw + noise_Khw.to(scores_Khw), *arguments)

    Segmenter._finish = finish


def stop_children() -> None:
    """Let a careful child end before it begins, as the kernel would where it does not fit."""
    if "pipeline.careful" in sys.orig_argv:
        os.kill(os.getpid(), signal.SIGKILL)


def _suffer(station: str, data: bytes) -> None:
    for name, deed in DEEDS.items():
        if data.endswith(station.encode() + b":" + name):
            time.sleep(DELAY_S)
            deed()


def everywhere(folder: Path, what: Callable[[], None]) -> dict[str, str]:
    """The environment in which each new Python process does this at its start."""
    folder.mkdir()
    code = f"import tests.poisons\ntests.poisons.{what.__name__}()\n"
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), HANGING: str(folder)}
