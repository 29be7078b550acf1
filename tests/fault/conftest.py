"""An archive long enough to be killed in the middle, and what a run over it must hold."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import runs
from tests.archives import filled
from tests.objects import mixed


@pytest.fixture(autouse=True)
def nothing_left(tmp_path) -> Iterator[None]:
    """Whatever a test killed: no process of its run outlives it (I8)."""
    yield
    runs.until(lambda: not _at(f"{tmp_path}/"), "the processes of its runs to end", 60, 0.2)


def _at(folder: str) -> list[str]:
    """Command lines that name this folder."""
    found = psutil.process_iter(["cmdline", "pid"])
    lines = [" ".join(p.info["cmdline"] or ()) for p in found if p.info["pid"] != os.getpid()]
    return [line for line in lines if folder in line]


@pytest.fixture(scope="session")
def long_archive(tmp_path_factory) -> Path:
    return filled(tmp_path_factory.mktemp("long"), mixed(160))


@pytest.fixture(scope="session")
def long_oracle(long_archive, tiny_bundle, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("long-oracle")
    runs.finished(runs.words(long_archive, folder / "run", tiny_bundle), folder / "log")
    return runs.content(folder / "run")
