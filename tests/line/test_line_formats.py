"""A run of another version: read where it can be, refused and left alone where it cannot."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_run
from pipeline.errors import RunRefused
from pipeline.fragment import assemble, read_header, read_index
from pipeline.ledger import Ledger
from pipeline.status import status
from pipeline.storage import open_store
from pipeline.verify import verify
from tests.archives import copied, problems, segment, tree, unpacked

V1 = Path(__file__).parents[1] / "fixtures" / "runs-v1.tar.xz"
"""A run with masks and one of a classifier, written by format version 1 on 2026-11-28; what they
answered then stands in answers.json."""
NEWER = 2


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    return unpacked(V1, tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def answers(old) -> dict:
    return json.loads((old / "answers.json").read_text())


def test_masks_of_version_1_are_what_they_were(old, answers):
    run = open_run(str(old / "masks"))

    now = {
        row["key"]: hashlib.sha256(run.mask(row["key"]).tobytes()).hexdigest()
        for row in run.images.to_pylist()
        if row["status"] == "done"
    }
    assert now == answers["masks"]
    assert {row["key"]: row["reason"] for row in run.rejected.to_pylist()} == answers["rejected"]


def test_classes_of_version_1_are_what_they_were(old, answers):
    run = open_run(str(old / "classes"))

    keys = [row["key"] for row in run.images.to_pylist() if row["status"] == "done"]
    assert {key: run.prediction(key)["name"] for key in keys} == answers["classes"]


@pytest.mark.parametrize("name", ["masks", "classes"])
def test_a_run_of_version_1_is_whole_and_finished(old, name):
    ledger = Ledger.open(open_store(str(old / name)))

    assert problems(old / name) == []
    assert status(ledger).pending == 0


def newer_run(run: Path) -> None:
    path = run / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": NEWER}))


def newer_manifest(run: Path) -> None:
    path = run / "manifest/000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": NEWER}))


def newer_fragment(run: Path) -> None:
    """With good checksums: not damaged, only younger."""
    path = run / "masks.zarr/mask/c/0"
    data, n_slots = path.read_bytes(), Ledger.open(open_store(str(run))).layout.index_entries
    header = read_header(data)
    spans = [(n, s) for n, s in enumerate(read_index(data, n_slots).tolist()) if s[0] != 2**64 - 1]
    frames = [data[start : start + nbytes] for _, (start, nbytes) in spans]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.fragment.FORMAT_VERSION", NEWER)
        tables = header.images, header.class_stats
        path.write_bytes(assemble(header.about, *tables, frames, [n for n, _ in spans], n_slots))


@pytest.mark.parametrize("younger", [newer_run, newer_manifest, newer_fragment])
def test_what_a_newer_version_wrote_is_refused_by_name_and_left_alone(finished, tmp_path, younger):
    run = copied(finished.out, tmp_path / "run")
    younger(run)
    if younger is newer_fragment:
        (run / "final/images.parquet").unlink()  # so that fragments are looked at again
    before = tree(run)

    with pytest.raises(RunRefused, match=rf"format version {NEWER}.*use the version that wrote it"):
        segment(finished.source, run, finished.model, slot_bytes=4096)
    with pytest.raises(RunRefused, match=f"format version {NEWER}"):
        verify(Ledger.open(open_store(str(run))))

    assert tree(run) == before


def test_a_mask_of_version_1_is_read_by_zarr_alone(old, answers):
    import zarr

    row = next(r for r in open_run(str(old / "masks")).images.to_pylist() if r["status"] == "done")
    flat = zarr.open_group(str(old / "masks/masks.zarr"), mode="r")["mask"]
    start, area = row["pixel_start"], row["height"] * row["width"]

    mask = np.asarray(flat[start : start + area])

    assert hashlib.sha256(mask.tobytes()).hexdigest() == answers["masks"][row["key"]]
