"""Whether this machine has the memory that a run cannot do without."""

import resource
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import RunRefused

MB = 1024**2
LEAST = 128 * MB
"""What a process that segments has for itself at least: Python, torch and Arrow took 165 MB that
they shared with nobody before a picture was read (torch 2.13 for CPUs)."""


def refuse_too_little(weights: int, processes: int) -> None:
    """Refuse a model that cannot even be loaded; pictures need more, but how much is not known.

    Args:
        weights: of the model, in bytes.
        processes: that hold it on this machine.

    Raises:
        RunRefused: with the numbers.
    """
    need, have = processes * (LEAST + weights), obtainable()
    if have is not None and need > have:
        raise RunRefused(
            f"--model: its weights ({weights // MB} MB) and code ({LEAST // MB} MB), held by "
            f"{processes} at a time, need {need // MB} MB of memory; this machine has "
            f"{have // MB} MB for them. Fewer --compute.workers, a smaller model or more memory"
        )


def obtainable(root: Path = Path("/")) -> int | None:
    """Bytes that this process and its children may have in all; None if the kernel does not say.

    Generous: what has been taken already counts, and swap on top of a limit.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return None
    cells = (line.split() for line in lines)
    known = {cell[0]: int(cell[1]) * 1024 for cell in cells}
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return min(known["MemAvailable:"] + mine, *_limits(root)) + known["SwapFree:"]


def _limits(root: Path) -> Iterator[int]:
    """What the control groups of this process allow: its own and all above, version 1 and 2."""
    yield 2**63
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            text = (folder / name).read_text().strip() if (folder / name).exists() else "max"
            if text != "max":
                yield int(text)
            if folder == top:
                break
