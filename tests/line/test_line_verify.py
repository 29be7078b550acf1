"""`verify` finds every kind of damage, names the object, and never falls over it."""

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import MaskfleetError
from pipeline.fragment import assemble, compress, decompress, read_header, read_index
from pipeline.ledger import Ledger, digest_of
from pipeline.status import status
from pipeline.storage import local, open_store
from pipeline.verify import verify
from tests.archives import copied, filled, png, problems, segment

C = "masks.zarr/mask/c"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return copied(finished.out, tmp_path / "run")


@pytest.fixture(scope="module")
def with_large(tmp_path_factory, tiny_bundle) -> Path:
    """A run of two masks in slots and one in an array of its own."""
    folder = tmp_path_factory.mktemp("large")
    source = filled(
        folder / "in", {"a.png": png(40, 48, 1), "b.png": png(40, 48, 2), "odd.png": png(70, 90, 3)}
    )
    segment(source, folder / "out", tiny_bundle, layout="stacked", size="40x48")
    return folder / "out"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def edited(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def retable(path: Path, edit) -> None:
    """Write a Parquet file again with its rows changed, its row groups as they were."""
    file = pq.ParquetFile(io.BytesIO(path.read_bytes()), pre_buffer=False)
    groups = [
        file.read_row_group(g, use_threads=False).to_pylist() for g in range(file.num_row_groups)
    ]
    edit(groups)
    schema = file.schema_arrow
    with pq.ParquetWriter(path, schema) as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def rewritten(path: Path, n_slots: int, rows=None, stats=None, frames=None, about=None) -> None:
    """Write a fragment's object again with valid checksums, but saying something else."""
    data = path.read_bytes()
    header = read_header(data)
    spans = [(i, s) for i, s in enumerate(read_index(data, n_slots).tolist()) if s[0] != 2**64 - 1]
    kept = [data[start : start + nbytes] for _, (start, nbytes) in spans]
    images, class_stats = header.images.to_pylist(), header.class_stats.to_pylist()
    for edit, value in ((rows, images), (stats, class_stats), (frames, kept)):
        if edit:
            edit(value)
    offset = 0
    for row in images:
        if row["byte_nbytes"]:
            count = len(row["byte_nbytes"])
            first = [number for number, _ in spans].index(
                row["pixel_start"] // 4096 % n_slots if row["pixel_start"] is not None else 0
            )
            sizes = [len(frame) for frame in kept[first : first + count]]
            row |= {"byte_offset": offset, "byte_nbytes": sizes}
            offset += sum(sizes)
    said = {**header.about, **(about or {})}
    tables = (
        pa.Table.from_pylist(images, header.images.schema),
        pa.Table.from_pylist(class_stats, header.class_stats.schema),
    )
    path.write_bytes(assemble(said, *tables, kept, [i for i, _ in spans], n_slots))


def found(run: Path, *words: str) -> None:
    """One of the findings has all these words."""
    findings = problems(run)
    assert any(all(word in text for word in words) for text in findings), findings


def test_a_good_run_has_nothing_wrong(finished, with_large):
    assert problems(finished.out) == []
    assert problems(with_large) == []


def test_a_flipped_byte_anywhere_in_a_fragment_is_found(run):
    path = run / C / "1"
    size = path.stat().st_size
    for at in [0, 5, 9, 13, 40, 200, size // 3, size // 2, size - 70_000, size - 20, size - 1]:
        flip(path, at)
        found(run, f"{C}/1", "delete it and run segment again")
        flip(path, at)
    assert problems(run) == []


@pytest.mark.parametrize("path", [f"{C}/1", "bundle/weights.safetensors", "final/images.parquet"])
def test_an_object_on_a_bad_sector_is_found(run, monkeypatch, path):
    def opened(target):
        if target == run / path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return whole(target)

    whole = local._opened
    monkeypatch.setattr(local, "_opened", opened)
    found(run, path.partition("/weights")[0], "corrupt_read", "Input/output error")


def test_a_fragment_that_was_deleted_is_pending_and_comes_back(finished, run):
    (run / C / "2").unlink()
    assert problems(run) == ["1 pending"]

    segment(finished.source, run, finished.model, slot_bytes=4096)

    assert problems(run) == []


def test_a_fragment_in_the_place_of_another_is_found(run):
    (run / C / "1").write_bytes((run / C / "2").read_bytes())

    found(run, f"{C}/1", "says it is fragment 2")
    found(run, f"{C}/1", "other ones than the 4 of the plan")


@pytest.mark.parametrize("name", ["99", "foreign", "0/0", "1.tmp", "zarr.json"])
def test_what_does_not_belong_among_the_commits_is_found(run, name):
    if name == "0/0":
        (run / C / "7").mkdir()
        name = "7/0"
    (run / C / name).write_bytes(b"?")

    found(run, f"{C}/{name}")


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        (
            {"stats": lambda s: s[0].update(pixel_count=s[0]["pixel_count"] + 1)},
            ["class_stats says"],
        ),
        ({"stats": lambda s: s[0].update(fraction=0.123)}, ["a fraction is not"]),
        ({"stats": lambda s: s.pop(0)}, ["class_stats says"]),
        ({"rows": lambda r: r[0].update(nodata_pixels=3)}, ["nodata_pixels is 3"]),
        ({"rows": lambda r: r[0].update(height=r[0]["height"] - 1)}, ["image 0"]),
        ({"rows": lambda r: r[0].update(reason="boredom")}, ["boredom"]),
        ({"rows": lambda r: r[0].update(model_version="other@1")}, ["made by other@1"]),
        ({"rows": lambda r: r[0].update(key="another.jpg")}, ["of the plan"]),
        ({"about": {"n_done": 4}}, ["counts are not those of its rows"]),
    ],
    ids=["count", "fraction", "gone-stat", "nodata", "height", "reason", "model", "key", "n_done"],
)
def test_numbers_that_do_not_fit_the_pixels_are_found_behind_valid_checksums(run, edits, words):
    rewritten(run / C / "0", 4096, **edits)

    found(run, f"{C}/0", *words)


def test_other_pixels_behind_valid_checksums_are_found(run):
    def darken(frames):
        values = decompress(frames[0], "uint8").copy()
        values[:7] = 1 - values[:7]
        frames[0] = compress(values)

    rewritten(run / C / "0", 4096, frames=darken)

    found(run, f"{C}/0", "image 0")


def test_a_value_that_is_no_class_is_found(run):
    def strange(frames):
        values = decompress(frames[0], "uint8").copy()
        values[0] = 77
        frames[0] = compress(values)

    rewritten(run / C / "0", 4096, frames=strange)

    found(run, f"{C}/0", "values [77] are no classes")


@pytest.mark.parametrize(
    "path", ["final/images.parquet", "final/rejected.parquet", "manifest/000.json"]
)
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_what_is_made_from_the_fragments_comes_back(finished, run, path, damage):
    whole = (run / path).read_bytes()
    (run / path).unlink()
    if damage == "cut":
        (run / path).write_bytes(whole[:40])

    segment(finished.source, run, finished.model, slot_bytes=4096)

    assert problems(run) == []


def test_a_copy_of_a_run_elsewhere_is_as_good_as_the_run(finished, tmp_path):
    for path in finished.out.rglob("*"):  # without times, as an upload would copy it
        if path.is_file():
            to = tmp_path / path.relative_to(finished.out)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())

    assert problems(tmp_path) == []


@pytest.mark.parametrize("name", ["images", "class_stats", "rejected", "fragments"])
def test_a_final_table_that_is_gone_or_changed_is_found(run, name):
    path = run / f"final/{name}.parquet"
    whole = path.read_bytes()

    path.unlink()
    found(run, f"final/{name}.parquet", "run segment again")

    path.write_bytes(whole)
    flip(path, len(whole) // 2)
    found(run, f"final/{name}.parquet", "SHA-256")

    path.write_bytes(whole[: len(whole) // 2])
    found(run, f"final/{name}.parquet")


def test_counts_of_a_manifest_that_were_edited_are_found(run):
    path = run / "manifest/000.json"
    for key, value in (("done", 13), ("planned", 12), ("pixels", 1), ("rejected", 0)):
        text = path.read_text()
        edited(path, lambda m, key=key, value=value: m["counts"].update({key: value}))
        found(run, "manifest/000.json", "SHA-256")
        edited(path, lambda m: m.update(sha256=digest_of(m)))
        found(run, "manifest/000.json", key)
        path.write_text(text)
    assert problems(run) == []


def test_a_flipped_digit_of_a_manifest_never_reaches_who_asks_for_the_counts(finished, run):
    edited(run / "manifest/000.json", lambda m: m["counts"].update(done=99))

    outcome = segment(finished.source, run, finished.model, slot_bytes=4096)

    assert outcome.counts.done < 99
    assert problems(run) == []


def test_a_manifest_that_is_gone_or_no_json_is_found(run):
    path = run / "manifest/000.json"
    text = path.read_text()

    path.write_text(text[:40])
    found(run, "manifest/000.json")

    path.unlink()
    found(run, "manifest/", "run segment again")


def test_a_truncated_plan_is_found(run):
    path = run / "plan/000.parquet"
    path.write_bytes(path.read_bytes()[:-40])

    found(run, "plan/000.parquet")


def test_a_plan_whose_fragments_table_is_damaged_is_found(run):
    path = run / "plan/000.fragments.parquet"
    path.write_bytes(path.read_bytes()[:-40])

    found(run, "plan/000.fragments.parquet")


@pytest.mark.parametrize(
    "edit",
    [
        lambda groups: groups[0].pop(),
        lambda groups: groups[0][0].update(image_id=99),
        lambda groups: groups[1][0].update(fragment=0),
        lambda groups: groups[0][0].update(key="another.jpg"),
        lambda groups: groups[0].reverse(),
    ],
    ids=["row-gone", "id", "fragment", "key", "order"],
)
def test_an_edited_plan_is_found(run, edit):
    retable(run / "plan/000.parquet", edit)

    assert problems(run) != []


def test_a_round_that_is_missing_in_between_is_found(run):
    for suffix in ("parquet", "fragments.parquet"):
        (run / f"plan/000.{suffix}").rename(run / f"plan/001.{suffix}")

    found(run, "plan/", "gap")


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_a_bundle_that_is_gone_or_changed_is_found(run, name):
    path = run / "bundle" / name
    flip(path, 30)
    found(run, f"bundle/{name}", "SHA-256")

    path.unlink()
    found(run, "bundle/")


@pytest.mark.parametrize("path", ["masks.zarr/zarr.json", "masks.zarr/mask/zarr.json"])
def test_metadata_that_other_readers_need_is_checked(run, path):
    text = (run / path).read_text()

    (run / path).write_text(text.replace("255", "0"))
    found(run, path)

    (run / path).unlink()
    found(run, path)


def test_every_object_of_a_large_mask_is_checked(with_large, tmp_path):
    run = copied(with_large, tmp_path / "run")
    large = run / "masks.zarr/large/2"
    objects = sorted(p for p in large.rglob("*") if p.is_file())
    assert len(objects) == 1 + 4 + 4  # metadata of the group and of each level, one region each
    for path in objects:
        whole = path.read_bytes()
        name = str(path.relative_to(run))

        flip(path, len(whole) // 2)
        assert any(name in text for text in problems(run)), name

        path.unlink()
        assert any(name in text for text in problems(run)), name
        path.write_bytes(whole)
    assert problems(run) == []


def test_a_large_mask_of_other_pixels_is_found(with_large, tmp_path, monkeypatch):
    run = copied(with_large, tmp_path / "run")
    path = run / "masks.zarr/large/2/1/c/0/0"
    from pipeline.large import region_bytes

    path.write_bytes(region_bytes(np.zeros((35, 45), np.uint8), 2048, 255, {}))

    found(run, "masks.zarr/large/2/1/c/0/0")


def test_status_of_a_damaged_run_is_an_answer_and_not_a_bug(run):
    flip(run / C / "1", 20)
    from pipeline.errors import MaskfleetError

    with pytest.raises(MaskfleetError, match=f"{C}/1"):
        status(Ledger.open(open_store(str(run))))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("notes.txt", "is no part of a run"),
        ("final/extra.parquet", "is no part of a run"),
        ("masks.zarr/mask/c/99", "no plan asks for it"),
        ("masks.zarr/large/99/0/c/0/0", "there is no such image"),
        ("attempts/99/0", "there is no such fragment"),
        ("manifest/007.json", "there is no such round"),
    ],
)
def test_what_belongs_to_no_run_is_named(run, path, said):
    filled(run, {path: b"{}"})

    found(run, path, said)


def test_what_killed_writers_left_is_counted_and_swept_once_it_is_old(finished, run):
    old, young = run / "final/.tmp-old", run / "masks.zarr/.tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))

    findings = verify(Ledger.open(open_store(str(run))))
    assert (findings.problems, findings.debris) == ([], 2)
    (run / C / "2").unlink()  # so that there is something to do
    segment(finished.source, run, finished.model, slot_bytes=4096)

    assert [old.exists(), young.exists()] == [False, True]


OWN = (
    "run.json", "bundle/model.json", "bundle/weights.safetensors", "plan/000.parquet",
    "plan/000.fragments.parquet", "masks.zarr/zarr.json", "masks.zarr/mask/zarr.json", f"{C}/1",
    "final/images.parquet", "final/class_stats.parquet", "manifest/000.json", "receipt.json",
)  # fmt: skip


def ended(finished, run: Path) -> str:
    """What a call that refuses to go on says; nothing if it ends well."""
    try:
        segment(finished.source, run, finished.model, slot_bytes=4096)
    except MaskfleetError as error:
        return str(error)
    return ""


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    flip(path, path.stat().st_size // 3)


@pytest.mark.parametrize("damage", [emptied, cut, flipped])
@pytest.mark.parametrize("path", OWN)
def test_a_call_on_a_damaged_run_mends_it_or_names_what_is_damaged(finished, run, path, damage):
    """One fragment is missing, so that the call reads what it would otherwise leave alone."""
    (run / C / "2").unlink()
    before = {p.name: p.read_bytes() for p in (run / C).iterdir() if p.name != "1"}
    damage(run / path)

    said = ended(finished, run)

    if said:
        assert path.removesuffix(".fragments.parquet") in said
    else:
        told = problems(run)
        assert not told or all(path in text for text in told), told
    assert all((run / C / name).read_bytes() == data for name, data in before.items())
