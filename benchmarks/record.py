"""Dated lines of RESULTS.md: what was measured, at which commit, where, by which command."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def machine() -> str:
    """Cores, processor and its widest registers, as far as the system tells."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    about = {name.strip(): value.strip() for name, _, value in lines}
    wide = "AVX-512" if "avx512f" in about.get("flags", "").split() else ""
    words = [about.get("model name", platform.processor()), wide]
    return ", ".join([f"{len(os.sched_getaffinity(0))} cores", *filter(None, words)])


def commit() -> str:
    """The short commit, with a + where the tree differs from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def shown(word: str) -> str:
    """A word of the command line; of a path only its end, which says what the data are."""
    path = Path(word)
    return "/".join(path.parts[-2:]) if path.is_absolute() else word


def module() -> str:
    """The benchmark that runs, as `python -m` knows it: a file or a package of this folder."""
    path = Path(sys.argv[0]).with_suffix("")
    return f"benchmarks.{path.parent.name if path.name == '__main__' else path.name}"


def record(title: str, lines: list[str]) -> None:
    """Print the lines and append them to RESULTS.md."""
    date = datetime.now(UTC).date().isoformat()
    words = ["python", "-m", module(), *map(shown, sys.argv[1:])]
    command = shlex.join(words)
    text = "\n".join(
        [
            f"## {date} {title}",
            "",
            f"{commit()}, {machine()}; load before: {os.getloadavg()[0]:.1f}",
            "",
            f"    {command}",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    with RESULTS.open("a") as file:
        file.write(text + "\n")
