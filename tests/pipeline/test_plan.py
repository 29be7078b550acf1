"""The plan: what is listed, how it is cut into fragments, and what a later round holds."""

import hashlib
import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import plan
from pipeline.config import from_mapping
from pipeline.errors import RunRefused
from pipeline.known import SCHEMA as KNOWN
from pipeline.known import Known
from pipeline.listing import Listing
from pipeline.plan import (
    FRAGMENTS,
    SCHEMA,
    Start,
    fragments_table,
    plan_round,
    read_fragment,
    to_parquet,
)
from pipeline.storage import Found, LocalStore
from tests.pictures import parquet_of, tar_of


class Listed:
    """A store of names and sizes: planning loose files must read nothing else."""

    uri = "s3://bucket/prefix"

    def __init__(self, sizes: dict[str, int], etags: dict[str, str] | None = None) -> None:
        self.sizes, self.etags = sizes, etags or {}

    def list(self, prefix=""):
        for path in sorted(self.sizes):
            yield Found(path, self.sizes[path], self.etags.get(path, "e1"), 0.0)


def planned(store, known=None, first=Start(), listing=None, **knobs):  # noqa: B008 - frozen
    config = from_mapping({"source": "/in", "out": "/out", **knobs})
    return plan_round(store, config, listing or Listing(), known or Known(), first).table


def sizes_of(table) -> list[int]:
    return fragments_table(table)["images"].to_pylist()


# -- fragments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "most"),
    [(1, 16), (40, 16), (1024, 16), (2048, 32), (64 * 1024, 1024), (100_000, 1024)],
)
def test_a_fragment_holds_a_64th_of_the_images_but_16_to_1024(images, most):
    table = planned(Listed({f"{i:06}.jpg": 1 for i in range(images)}))

    sizes = sizes_of(table)

    assert sum(sizes) == images
    assert sizes[:-1] == [most] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= most


def test_a_fragment_holds_so_many_bytes_and_one_image_at_least():
    sizes = {"a.jpg": 60, "b.jpg": 40, "c.jpg": 1, "d.jpg": 500, "e.jpg": 99, "f.jpg": 1}

    table = planned(Listed(sizes), fragment={"bytes": 100})

    assert sizes_of(table) == [2, 1, 1, 2]
    assert fragments_table(table)["nbytes"].to_pylist() == [100, 1, 500, 100]


def test_fragments_depend_on_counts_and_bytes_alone():
    names = [f"{i:03}" for i in range(50)]
    one = planned(Listed({f"a/{n}.jpg": 10 + int(n) for n in names}))
    other = planned(
        Listed({f"zz-{n}.png": 10 + int(n) for n in names}, {"zz-001.png": "another"}),
        decode={"max_pixels": 5},
        compute={"workers": 7},
    )

    assert one["fragment"].equals(other["fragment"])
    assert one["image_id"].equals(other["image_id"])


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 7), st.integers(1, 5))
def test_fragments_are_cut_the_same_however_the_listing_comes_in_parts(nbytes, images, chunk):
    sizes = {f"{i:03}.jpg": n for i, n in enumerate(nbytes)}
    expected, inside, held = [], 0, 0
    for size in nbytes:
        if inside and (inside >= images or held + size > 100):
            inside = held = 0
        expected = expected if inside else [*expected, 0]
        expected[-1] += 1
        inside, held = inside + 1, held + size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CHUNK", chunk)
        table = planned(Listed(sizes), fragment={"images": images, "bytes": 100})

    assert sizes_of(table) == expected
    assert table["key"].to_pylist() == list(sizes)
    assert table["image_id"].to_pylist() == list(range(len(sizes)))


def test_ids_count_up_in_key_order():
    table = planned(Listed({"b.jpg": 1, "a/z.jpg": 1, "a.jpg": 1}))

    assert table["key"].to_pylist() == ["a.jpg", "a/z.jpg", "b.jpg"]
    assert table["image_id"].to_pylist() == [0, 1, 2]
    assert set(table["change"].to_pylist()) == {"new"}


# -- what is listed ------------------------------------------------------------------------------


def archive(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return LocalStore(folder)


def test_sidecars_are_counted_by_suffix_and_never_planned(tmp_path):
    store = archive(
        tmp_path,
        {"a.jpg": b"1", "a.json": b"", "b.json": b"", "README": b"",
         "c.unheard": b"some text of mine",
         ".hidden.jpg": b"1", "s.tar": tar_of({"x.jpg": b"1", "x.cls": b"3"})},
    )  # fmt: skip
    os.mkfifo(tmp_path / "pipe.jpg")
    listing = Listing()

    table = planned(store, listing=listing)

    assert table["key"].to_pylist() == ["a.jpg", "s.tar#x.jpg"]
    assert dict(listing.skipped) == {
        ".json": 2, "README": 1, ".unheard": 1, ".jpg": 1, "webdataset member": 1,
        "not a regular file": 1,
    }  # fmt: skip


MASKED = {
    "a.jpg": b"1", "a.mask.png": b"2", "b/c.png": b"3", "b/c.SEG.png": b"4",
    "s.tar": tar_of({"x.jpg": b"5", "x.mask.png": b"6", "x.cls": b"7"}),
}  # fmt: skip


def test_masks_beside_pictures_are_counted_and_never_planned(tmp_path):
    listing = Listing()

    table = planned(archive(tmp_path, MASKED), listing=listing)

    assert table["key"].to_pylist() == ["a.jpg", "b/c.png", "s.tar#x.jpg"]
    assert dict(listing.skipped) == {"mask": 3, "webdataset member": 1}


def test_a_mask_stays_one_whatever_format_is_asked_for(tmp_path):
    store = archive(tmp_path, {name: MASKED[name] for name in ("a.mask.png", "s.tar")})
    listing = Listing()

    table = planned(store, listing=listing, format="webdataset")

    assert table["key"].to_pylist() == ["s.tar#x.jpg"]
    assert dict(listing.skipped) == {"mask": 2, "webdataset member": 1}


def test_include_and_exclude_are_globs_over_whole_keys(tmp_path):
    store = archive(
        tmp_path,
        {
            "a/1.jpg": b"1",
            "a/2.png": b"1",
            "b/1.jpg": b"1",
            "s.tar": tar_of({"1.jpg": b"1", "2.jpg": b"2"}),
        },
    )

    def keys(**knobs):
        listing = Listing()
        found = planned(store, listing=listing, **knobs)["key"].to_pylist()
        assert listing.left_out == 5 - len(found)
        return found

    assert keys(include=["a/*"]) == ["a/1.jpg", "a/2.png"]
    assert keys(include=["*.jpg"], exclude=["b/*", "*#2*"]) == ["a/1.jpg", "s.tar#1.jpg"]
    assert keys(exclude=["*"]) == []


def test_a_limit_takes_the_first_by_key_and_counts_the_others():
    listing = Listing()

    table = planned(Listed({f"{i}.jpg": 1 for i in range(9)}), listing=listing, limit=4)

    assert table["key"].to_pylist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert listing.left_out == 5


def test_a_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RunRefused, match="cannot read the source"):
        planned(LocalStore(tmp_path / "nowhere"))
    with pytest.raises(RunRefused, match="not a folder"):
        planned(archive(tmp_path, {"a.jpg": b"1"}).__class__(tmp_path / "a.jpg"))


def test_a_named_format_is_used_for_every_object_that_is_no_sidecar(tmp_path):
    store = archive(tmp_path, {"a.data": tar_of({"x.jpg": b"1"}), "b.bin": b"", "c.json": b"{}"})

    assert planned(store, format="webdataset")["key"].to_pylist() == ["a.data#x.jpg"]


# -- rounds --------------------------------------------------------------------------------------

NEXT = Start(round=1, image_id=10, fragment=3)


def known_of(store, table, retry=(), **reasons):
    def digest(row):
        data = store.read(row["key"]) if row["member"] is None else b""
        return hashlib.sha256(data).hexdigest()

    images = table.select(["key", "image_id", "etag"]).to_pylist()
    rows = [
        {**image, "sha256": digest(row), "reason": reasons.get(image["key"])}
        for image, row in zip(images, table.to_pylist(), strict=True)
    ]
    known = pa.Table.from_pylist(rows, KNOWN)
    return Known(lambda columns: iter(known.select(columns).to_batches(2)), retry)


def changes(table) -> dict[str, tuple[str, int, int, int | None]]:
    return {
        r["key"]: (r["change"], r["image_id"], r["fragment"], r["replaces"])
        for r in table.to_pylist()
    }


def test_a_later_round_holds_new_changed_and_removed_and_numbers_go_on(tmp_path):
    store = archive(tmp_path, {"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"})
    known = known_of(store, planned(store))
    (tmp_path / "b.jpg").write_bytes(b"22")
    (tmp_path / "c.jpg").unlink()
    (tmp_path / "d.jpg").write_bytes(b"4")

    later = planned(store, known, NEXT)

    assert changes(later) == {
        "b.jpg": ("changed", 10, 3, 1),
        "d.jpg": ("new", 11, 3, None),
        "c.jpg": ("removed", 2, -1, 2),
    }


def test_a_file_that_was_only_touched_is_not_computed_again(tmp_path):
    store = archive(tmp_path, {"a.jpg": b"1", "b.jpg": b"2"})
    known = known_of(store, planned(store))
    os.utime(tmp_path / "a.jpg", ns=(1, 1))

    assert planned(store, known, NEXT).num_rows == 0


def test_an_archive_that_has_not_changed_makes_an_empty_round(tmp_path):
    store = archive(tmp_path, {"a.jpg": b"1", "s.tar": tar_of({"x.jpg": b"1"})})

    assert planned(store, known_of(store, planned(store)), NEXT).num_rows == 0


def test_only_images_rejected_for_the_named_reason_are_tried_again(tmp_path):
    store = archive(tmp_path, {"a.jpg": b"1", "b.jpg": b"2", "c.jpg": b"3"})
    retry = ["vanished", "timeout"]
    reasons = {"a.jpg": "corrupt", "b.jpg": "vanished"}
    known = known_of(store, planned(store), retry, **reasons)

    later = planned(store, known, NEXT, retry=retry)

    assert changes(later) == {"b.jpg": ("retried", 10, 3, 1)}


def test_a_limited_round_removes_nothing_and_tops_up_to_the_limit(tmp_path):
    store = archive(tmp_path, {f"{i}.jpg": b"1" for i in range(6)})
    known = known_of(store, planned(store, limit=2))
    (tmp_path / "0.jpg").write_bytes(b"another")

    later = planned(store, known, NEXT, limit=4)

    assert changes(later) == {
        "0.jpg": ("changed", 10, 3, 0),
        "2.jpg": ("new", 11, 3, None), "3.jpg": ("new", 12, 3, None),
    }  # fmt: skip


@pytest.mark.parametrize("limit", [None, 7])
def test_a_later_round_is_the_same_however_the_listing_comes_in_parts(tmp_path, monkeypatch, limit):
    store = archive(tmp_path, {f"{i}.jpg": b"1" for i in range(0, 9, 2)})
    known = known_of(store, planned(store))
    (tmp_path / "2.jpg").write_bytes(b"another")
    (tmp_path / "4.jpg").unlink()
    (tmp_path / "8.jpg").unlink()
    archive(tmp_path, {"1.jpg": b"2", "3.jpg": b"2", "9.jpg": b"2"})
    monkeypatch.setattr(plan, "CHUNK", 2)
    listing = Listing()

    later = planned(store, known, NEXT, listing, limit=limit)

    gone = {"4.jpg": ("removed", 2, -1, 2), "8.jpg": ("removed", 4, -1, 4)}
    assert changes(later) == {
        "1.jpg": ("new", 10, 3, None),
        "2.jpg": ("changed", 11, 3, 1),
        "3.jpg": ("new", 12, 3, None),
        **({"9.jpg": ("new", 13, 3, None), **gone} if limit is None else {}),
    }
    assert listing.left_out == (0 if limit is None else 1)


def test_images_whose_digests_cannot_be_told_apart_are_compared_by_name(tmp_path, monkeypatch):
    store = archive(tmp_path, {f"{i}.jpg": b"1" for i in range(4)})
    monkeypatch.setattr(
        "pipeline.known._digests",
        lambda keys, etags: np.array([[7] * len(keys), [hash(key) for key in keys]]),
    )
    known = known_of(store, planned(store))
    (tmp_path / "2.jpg").write_bytes(b"another")
    (tmp_path / "3.jpg").unlink()

    later = planned(store, known, NEXT)

    assert changes(later) == {"2.jpg": ("changed", 10, 3, 2), "3.jpg": ("removed", 3, -1, 3)}


def test_rows_of_a_table_that_was_written_again_count_as_changed(tmp_path):
    store = archive(tmp_path, {"t.parquet": parquet_of([b"1", b"2"])})
    known = known_of(store, planned(store))
    (tmp_path / "t.parquet").write_bytes(parquet_of([b"1", b"2", b"3"]))

    found = changes(planned(store, known, NEXT)).values()
    assert [change for change, *_ in found] == ["changed", "changed", "new"]


# -- as objects ----------------------------------------------------------------------------------


def test_the_plans_columns_are_frozen():
    assert SCHEMA.names == [
        "image_id", "key", "uri", "member", "offset", "nbytes", "etag", "format", "fragment",
        "problem", "change", "replaces",
    ]  # fmt: skip
    assert FRAGMENTS.names == ["fragment", "row_group", "images", "nbytes", "first_image_id"]


def test_each_fragment_is_a_row_group_that_can_be_read_alone(tmp_path):
    store = archive(tmp_path, {f"{i}.jpg": b"1" for i in range(7)})
    config = from_mapping({"source": "/in", "out": "/out", "fragment": {"images": 3}})
    made = plan_round(store, config, Listing(), Known(), Start())

    file = pq.ParquetFile(io.BytesIO(to_parquet(made, "token", {})))

    assert file.schema_arrow.metadata[b"maskfleet.token"] == b"token"
    groups = fragments_table(made.table)
    assert groups["row_group"].to_pylist() == [0, 1, 2]
    assert [
        [image.key for image in read_fragment(file, group)] for group in range(file.num_row_groups)
    ] == [["0.jpg", "1.jpg", "2.jpg"], ["3.jpg", "4.jpg", "5.jpg"], ["6.jpg"]]
