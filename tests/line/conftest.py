"""One mixed archive and its run, made once; damage a copy of it."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import run
from pipeline.clock import Clock
from tests import archives


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> SimpleNamespace:
    """An archive of 13 images (`archives.mixed`), its run, and how the call ended."""
    folder = tmp_path_factory.mktemp("line")
    source, out = archives.mixed(folder / "in"), folder / "out"
    outcome = archives.segment(source, out, tiny_bundle, slot_bytes=4096)
    return SimpleNamespace(source=source, out=out, outcome=outcome, model=tiny_bundle)


@pytest.fixture(autouse=True)
def small_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw overview.png with cells of 32 pixels: at full size it costs half of a small run."""
    monkeypatch.setattr("pipeline.overview.SIDE", 32)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answer a fragment that was begun before in this process too: the child costs 3 s a time, and
    fault/ tests it."""

    def segment_here(encoded, line, slots):
        return run.answer(encoded, line, SEGMENTERS[line.ledger.store.uri], Clock(), slots)

    def remembered(task, encoded, line, segmenter, clock):
        SEGMENTERS[line.ledger.store.uri] = segmenter
        return attempt(task, encoded, line, segmenter, clock)

    attempt = run.attempt
    monkeypatch.setattr(run, "segment_carefully", segment_here)
    monkeypatch.setattr(run, "attempt", remembered)
    yield
    SEGMENTERS.clear()


SEGMENTERS: dict = {}
