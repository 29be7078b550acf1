"""A module that the command line names, on Ray: its workers have it too."""

from __future__ import annotations

import pytest

from pipeline.errors import EXIT_DONE
from tests import guests, runs
from tests.archives import segment, uniform

pytestmark = pytest.mark.timeout(180)


def test_a_module_named_on_the_command_line_reaches_the_workers(tmp_path, monkeypatch):
    source, name = uniform(tmp_path / "in", 12), guests.module(tmp_path / "theirs")
    monkeypatch.syspath_prepend(tmp_path / "theirs")
    model = guests.module_bundle(tmp_path / "bundle", name)
    segment(source, tmp_path / "alone", model, architecture=name)

    words = runs.words(source, tmp_path / "spread", model, "--architecture", name)
    path = f"{runs.ROOT}:{tmp_path / 'theirs'}"  # the cluster is the driver's, and inherits it
    with runs.command([*words, "--on", "local"], environment={"PYTHONPATH": path}) as driver:
        assert driver.ended() == EXIT_DONE, driver.out + driver.err

    assert runs.content(tmp_path / "spread")["masks"] == runs.content(tmp_path / "alone")["masks"]
