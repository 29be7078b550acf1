"""An archive long enough to be killed in the middle, and what a run over it must hold."""

from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.archives import filled
from tests.objects import mixed


@pytest.fixture(scope="session")
def long_archive(tmp_path_factory) -> Path:
    return filled(tmp_path_factory.mktemp("long"), mixed(160))


@pytest.fixture(scope="session")
def long_oracle(long_archive, tiny_bundle, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("long-oracle")
    runs.finished(runs.words(long_archive, folder / "run", tiny_bundle), folder / "log")
    return runs.content(folder / "run")
