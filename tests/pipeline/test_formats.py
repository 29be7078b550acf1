"""The three formats: one contract, and what each can suffer."""

import io
import itertools
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
import types
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import apart, formats, listing
from pipeline.config import from_mapping
from pipeline.errors import REASONS, RunRefused
from pipeline.foreign_table import COLUMNS
from pipeline.formats import parquet
from pipeline.listing import Listing, discover
from pipeline.records import EncodedImage
from pipeline.storage import LocalStore, ObjectUnreadable
from tests import readers
from tests.contracts.formats import PICTURES, FormatContract, ShardContract, fetched, planned
from tests.hostile import ends_its_reader
from tests.pictures import parquet_of, tar_of

ROOT = Path(__file__).parents[2]


class TestFiles(FormatContract):
    format_name = "files"

    def write(self, folder, pictures):
        for number, picture in enumerate(pictures):
            path = folder / "sub" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture)


class TestWebdataset(ShardContract):
    format_name, shard = "webdataset", "shard.tar"

    def write(self, folder, pictures):
        (folder / self.shard).write_bytes(
            tar_of({f"{number}.png": picture for number, picture in enumerate(pictures)})
        )


class TestParquet(ShardContract):
    format_name, shard = "parquet", "table.parquet"

    def write(self, folder, pictures):
        (folder / self.shard).write_bytes(parquet_of(pictures))


def test_an_unknown_format_is_refused_with_the_list():
    with pytest.raises(RunRefused, match="files, parquet, webdataset"):
        formats.load("zip")
    with pytest.raises(RunRefused, match=r"acme\.dicom"):
        formats.load("acme.dicom")


def test_a_module_outside_is_a_format_for_those_who_name_it_or_have_it(tmp_path, monkeypatch):
    (tmp_path / "acme_formats").mkdir()
    (tmp_path / "acme_formats/__init__.py").touch()
    (tmp_path / "acme_formats/dicom.py").write_text("SUFFIXES = ('.dcm',)\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = "acme_formats.dicom"

    with pytest.raises(RunRefused, match=f"import {name} first"):  # a plan says so, nobody else
        formats.load(name)
    assert "acme_formats" not in sys.modules

    assert formats.load(name, name).SUFFIXES == (".dcm",)
    assert formats.load(name).SUFFIXES == (".dcm",)  # it is here now
    for module in ("acme_formats", name):
        monkeypatch.delitem(sys.modules, module)


# -- tar -----------------------------------------------------------------------------------------


def shard_of(tmp_path, data: bytes) -> LocalStore:
    (tmp_path / "s.tar").write_bytes(data)
    return LocalStore(tmp_path)


def tar_with(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for entry, content in entries:
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, content: bytes = PICTURES[0], kind: bytes = tarfile.REGTYPE, link: str = ""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    entry.size = len(content) if kind == tarfile.REGTYPE else 0
    return entry, content


def keys_of(store: LocalStore) -> list[str]:
    return [image.key for image in planned(store)]


def with_size(tar: bytes, size: bytes, at: int = 0) -> bytes:
    """The shard with 12 bytes for the size of the member whose header is there, checksum mended."""
    header = bytearray(tar[at : at + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:at] + bytes(header) + tar[at + 512 :]


def test_a_truncated_tar_keeps_the_members_before_the_damage(tmp_path):
    whole = tar_of({"1.png": PICTURES[0], "2.png": PICTURES[1], "3.png": PICTURES[2]})
    second = 512 + (len(PICTURES[0]) + 511 & ~511)
    store = shard_of(tmp_path, whole[: second + 512 + 100])

    images = planned(store)

    assert [image.key for image in images[:2]] == ["s.tar#1.png", "s.tar#2.png"]
    assert images[0].problem is None
    assert images[1].problem == f"truncated: 100 of {len(PICTURES[1])} bytes are in the shard"
    assert [item.data for item in fetched(store, images)] == [PICTURES[0]]


def test_a_tar_cut_in_a_header_says_that_something_is_missing(tmp_path):
    whole = tar_of({"1.png": PICTURES[0], "2.png": PICTURES[1]})
    second = 512 + (len(PICTURES[0]) + 511 & ~511)
    store = shard_of(tmp_path, whole[: second + 100])

    first, rest = planned(store)

    assert (first.key, first.problem) == ("s.tar#1.png", None)
    assert rest.key == "s.tar"
    assert rest.problem.startswith("truncated: tar shard")


def test_members_with_the_same_name_are_all_there(tmp_path):
    entries = [member("a", picture) for picture in PICTURES[:3]]
    store = shard_of(tmp_path, tar_with(*entries, member("a;2", PICTURES[3])))

    images = planned(store)

    assert [image.key for image in images] == [
        "s.tar#a", "s.tar#a;2", "s.tar#a;3", "s.tar#a%3B2",
    ]  # fmt: skip
    assert [item.data for item in fetched(store, images)] == PICTURES[:4]


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    names = ["../../evil.png", "/abs/evil.png", "a/../b.png", "x#y.png", "new\nline.png"]
    store = shard_of(tmp_path, tar_with(*map(member, names)))

    assert keys_of(store) == [
        "s.tar#../../evil.png", "s.tar#/abs/evil.png", "s.tar#a/../b.png", "s.tar#x%23y.png",
        "s.tar#new%0Aline.png",
    ]  # fmt: skip
    assert [item.data for item in fetched(store, planned(store))] == [PICTURES[0]] * 5


def test_links_devices_folders_and_sidecars_are_skipped_and_counted(tmp_path):
    odd = [
        member("link.png", b"", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard.png", b"", tarfile.LNKTYPE, "../../etc/passwd"),
        member("device.png", b"", tarfile.CHRTYPE),
        member("block.png", b"", tarfile.BLKTYPE),
        member("fifo.png", b"", tarfile.FIFOTYPE),
        member("folder.png", b"", tarfile.DIRTYPE),
        member("a.json", b"{}"),
        member("a.pkl", b"cos\nsystem\n."),
        member("__key__.xyz", b"?"),
        member(".hidden.png"),
        member("good.png"),
    ]
    store = shard_of(tmp_path, tar_with(*odd))
    listing = Listing()
    config = from_mapping({"source": store.uri, "out": "/nowhere"})

    found = [entry.member for _, _, entry in discover(store, config, listing)]

    assert found == ["good.png"]
    assert sum(listing.skipped.values()) == len(odd) - 1


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,  # -1 in base 256: CVE-2025-8194 loops for ever on it
        b"\xff" * 10 + b"\xfe\x00",  # -512
        b"\x80" + b"\x7f" * 11,
        b"77777777777\0",
        b"not a size!\0",
    ],
    ids=["minus-1", "minus-512", "beyond-64-bits", "8-GB", "text"],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_lie_about_a_size_ends_quickly_and_costs_only_what_comes_after(tmp_path, size, kind):
    good = tar_of({"1.png": PICTURES[0], "2.png": PICTURES[1]})
    second = 512 + (len(PICTURES[0]) + 511 & ~511)
    data = bytearray(good)
    data[second + 156 : second + 157] = kind
    store = shard_of(tmp_path, with_size(bytes(data), size, second))

    start = time.monotonic()
    images = planned(store)

    assert time.monotonic() - start < 2
    assert (images[0].key, images[0].problem) == ("s.tar#1.png", None)
    assert all(image.problem for image in images[1:])


def test_a_sparse_member_is_refused_because_its_bytes_are_not_its_content(tmp_path):
    entry = tarfile.TarInfo("a.png")
    entry.size = len(PICTURES[0])
    entry.pax_headers = {
        "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 20),
        "GNU.sparse.map": f"0,{len(PICTURES[0])}",
    }  # fmt: skip
    store = shard_of(tmp_path, tar_with((entry, PICTURES[0])))

    (image,) = planned(store)

    assert image.problem.startswith("unsupported_format")


def test_long_and_unicode_names_survive_in_both_dialects(tmp_path):
    name = "ä/" * 60 + "日本.png"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        store = shard_of(tmp_path, tar_with(member(name), form=form))
        assert keys_of(store) == [f"s.tar#{name}"]


def test_a_compressed_tar_by_the_name_of_a_tar_is_one_rejected_row(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry, content = member("a.png")
        tar.addfile(entry, io.BytesIO(content))
    store = shard_of(tmp_path, buffer.getvalue())

    (image,) = planned(store)

    assert image.problem.startswith("corrupt: tar shard")


def test_a_tar_is_known_by_its_content_where_its_name_says_nothing(tmp_path):
    (tmp_path / "shard.0001").write_bytes(tar_of({"a.png": PICTURES[0]}))
    (tmp_path / "picture.0002").write_bytes(PICTURES[1])
    (tmp_path / "notes.0003").write_bytes(b"some text, which is neither")
    store = LocalStore(tmp_path)

    assert keys_of(store) == ["picture.0002", "shard.0001#a.png"]


# -- shards of very many members -----------------------------------------------------------------


def test_a_shard_without_end_is_listed_as_far_as_somebody_asks(tmp_path, monkeypatch):
    asked = []

    def index(store, found):
        for number in itertools.count():
            asked.append(found.path)
            yield formats.Entry(str(number), None, 1)

    endless = types.SimpleNamespace(SUFFIXES=(".endless",), index=index)
    monkeypatch.setitem(sys.modules, "tests.endless", endless)
    monkeypatch.setattr(listing, "HELD", 7)
    for name in ("a.endless", "b.endless"):
        (tmp_path / name).write_bytes(b"x")
    store, values = LocalStore(tmp_path), {"out": "/nowhere", "format": "tests.endless"}
    config = from_mapping({"source": str(tmp_path), **values})

    found = discover(store, config, Listing())
    met = [(item[0].path, item[2].member) for item in itertools.islice(found, 20)]
    found.close()

    assert met == [("a.endless", str(number)) for number in range(20)]
    assert asked.count("a.endless") == 20
    assert asked.count("b.endless") == 7


def test_members_beyond_those_that_are_held_are_there_and_in_order(tmp_path, monkeypatch):
    (tmp_path / "s.tar").write_bytes(tar_of({f"{n}.png": PICTURES[n % 5] for n in range(9)}))
    (tmp_path / "t.parquet").write_bytes(parquet_of(PICTURES))
    whole = planned(LocalStore(tmp_path))

    monkeypatch.setattr(listing, "HELD", 4)

    assert planned(LocalStore(tmp_path)) == whole
    assert len(whole) == 14


# -- parquet -------------------------------------------------------------------------------------


def table_in(tmp_path, columns: dict, **options: object) -> LocalStore:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", **options)
    return LocalStore(tmp_path)


def binary(values: list) -> pa.Array:
    return pa.array(values, pa.binary())


def test_a_null_cell_is_an_empty_image_and_costs_only_itself(tmp_path):
    store = table_in(tmp_path, {"image": binary([PICTURES[0], None, PICTURES[1]])})

    answers = fetched(store, planned(store))

    assert [a.data for a in answers] == [PICTURES[0], None, PICTURES[1]]
    assert answers[1].verdict.reason == "empty"


def test_the_hugging_face_layout_is_read(tmp_path):
    rows = [{"bytes": p, "path": f"{i}.png"} for i, p in enumerate(PICTURES)] + [None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    store = table_in(
        tmp_path,
        {"label": pa.array(range(6)), "image": pa.array(rows, kind), "noise": binary(["x"] * 6)},
    )

    answers = fetched(store, planned(store))

    assert [a.data for a in answers] == [*PICTURES, None]


@pytest.mark.parametrize("codec", ["NONE", "SNAPPY", "ZSTD"])
def test_rows_of_several_row_groups_have_one_ordinal(tmp_path, codec):
    store = table_in(tmp_path, {"jpg": binary(PICTURES)}, row_group_size=2, compression=codec)

    images = planned(store)

    assert [image.key for image in images] == [f"t.parquet#{i}" for i in range(5)]
    assert [a.data for a in fetched(store, images[2:])] == PICTURES[2:]


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view()], ids=str)
def test_other_arrow_types_of_bytes_are_read(tmp_path, kind):
    store = table_in(tmp_path, {"png": pa.array(PICTURES, kind)})

    assert [a.data for a in fetched(store, planned(store))] == PICTURES


def test_of_several_columns_of_bytes_the_well_known_name_is_taken(tmp_path):
    store = table_in(tmp_path, {"thumbnail": binary(PICTURES[:1]), "jpg": binary(PICTURES[1:2])})

    assert [a.data for a in fetched(store, planned(store))] == PICTURES[1:2]


@pytest.mark.parametrize(
    "columns",
    [
        {"label": [1, 2]},
        {"text": ["a", "b"]},
        {"one": binary([b"1"]), "two": binary([b"2"])},  # which of them?
        {"lists": pa.array([[b"1", b"2"]], pa.list_(pa.binary()))},
    ],
    ids=["numbers", "text", "two-unknown", "lists"],
)
def test_a_table_without_a_column_of_image_bytes_is_one_rejected_row(tmp_path, columns):
    store = table_in(tmp_path, columns)

    (image,) = planned(store)

    assert image.key == "t.parquet"
    assert image.problem.startswith("corrupt: parquet shard: no column of image bytes")


@pytest.mark.parametrize(
    ("said", "rows"), [(b"\x80\xa0\x94\xa5\x8d\x1d", 5 * 10**11), (b"\x80\x89\x7a", 10**6)]
)
def test_a_footer_that_promises_more_rows_than_there_are_bytes_ends_quickly(tmp_path, said, rows):
    honest = parquet_of(PICTURES)
    (length,) = struct.unpack("<I", honest[-8:-4])
    footer = honest[-8 - length : -8]
    # num_rows is a zigzag varint: 5 is 0x0a, in the file's and in the row group's entry.
    lie = footer.replace(b"\x16\x0a", b"\x16" + said)
    assert lie.count(b"\x16" + said) >= 2
    data = honest[: -8 - length] + lie + struct.pack("<I", len(lie)) + b"PAR1"
    (tmp_path / "t.parquet").write_bytes(data)
    assert pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).num_rows == rows

    start = time.monotonic()
    images = planned(LocalStore(tmp_path))

    assert time.monotonic() - start < 5
    assert [image.problem.partition(":")[0] for image in images] == ["corrupt"]


def test_a_table_whose_pages_are_damaged_loses_its_rows_and_nothing_else(tmp_path):
    pq.write_table(pa.table({"image": binary(PICTURES)}), tmp_path / "t.parquet")
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[4:40] = b"\xff" * 36
    (tmp_path / "t.parquet").write_bytes(bytes(data))
    store = LocalStore(tmp_path)

    answers = fetched(store, planned(store))

    assert len(answers) == len(PICTURES)
    assert {a.verdict.reason for a in answers if a.data is None} == {"corrupt"}


def test_a_footer_at_which_the_reader_aborts_is_one_rejected_row(tmp_path):
    (tmp_path / "t.parquet").write_bytes(ends_its_reader())

    (image,) = planned(LocalStore(tmp_path))

    assert image.problem == (
        "corrupt: parquet shard: it ended its reader's process (exit -6), 2 times"
    )


FLIPS = 60 * int(os.environ.get("MASKFLEET_SEEDS", "1"))
"""Tables with some bytes changed, of each layout; one in a few thousand ends its reader."""


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("layout", ["plain", "struct", "dictionary"])
def test_flipped_bytes_of_a_table_are_read_or_refused_for_a_reason(tmp_path, codec, layout):
    cells = binary(PICTURES * 4)
    column = pa.StructArray.from_arrays([cells], ["bytes"]) if layout == "struct" else cells
    pq.write_table(
        pa.table({"image": column}), tmp_path / "t.parquet",
        compression=codec, use_dictionary=layout == "dictionary", row_group_size=7,
    )  # fmt: skip
    whole = (tmp_path / "t.parquet").read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    store, dice = LocalStore(tmp_path), random.Random(f"{codec} {layout}")
    outcomes = Counter()

    for _ in range(FLIPS):
        data = bytearray(whole)
        start = len(data) - 8 - footer if dice.random() < 0.6 else 4
        for _ in range(dice.choice((1, 1, 2, 4))):
            data[dice.randrange(start, len(data) - 8)] ^= 1 << dice.randrange(8)
        (tmp_path / "t.parquet").write_bytes(data)
        images = planned(store, "parquet")
        reasons = [(image.problem or "done").partition(":")[0] for image in images]
        answers = fetched(store, images)
        reasons += [answer.verdict.reason for answer in answers if answer.verdict is not None]
        outcomes.update(set(reasons))

    assert set(outcomes) <= {"done", *REASONS}
    assert outcomes["done"] > 0


@pytest.mark.parametrize(("deaths", "lost"), [(1, []), (2, ["corrupt"])])
def test_a_table_may_end_one_reader_and_loses_what_was_not_read_with_the_second(
    tmp_path, monkeypatch, deaths, lost
):
    answers = read_by(readers.dying_cells, deaths, tmp_path, monkeypatch)

    assert [a.data for a in answers if a.data is not None] == PICTURES[: len(PICTURES) - len(lost)]
    assert [a.verdict.reason for a in answers if a.data is None] == lost


def test_a_reader_that_dies_when_all_is_read_costs_nothing(tmp_path, monkeypatch):
    answers = read_by(readers.cells_and_death, 1, tmp_path, monkeypatch)

    assert [a.data for a in answers] == PICTURES


def read_by(cells, deaths, tmp_path, monkeypatch) -> list[EncodedImage]:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/t.parquet").write_bytes(parquet_of(PICTURES))
    store = LocalStore(tmp_path / "in")
    images = planned(store)
    monkeypatch.setattr(parquet, "cells", cells)
    monkeypatch.chdir(tmp_path)
    readers.DEATHS.write_bytes(bytes(deaths))
    apart._end_all()  # they were started elsewhere
    try:
        return fetched(store, images)
    finally:
        apart._end_all()


def test_a_row_group_of_fewer_rows_than_none_is_refused(tmp_path):
    honest = parquet_of(PICTURES)
    (length,) = struct.unpack("<I", honest[-8:-4])
    lie = honest[-8 - length : -8].replace(b"\x16\x0a", b"\x16\x15")  # 5 rows: -11, zigzag
    (tmp_path / "t.parquet").write_bytes(honest[: -8 - length] + lie + honest[-8:])

    (image,) = planned(LocalStore(tmp_path))

    assert image.problem.startswith("corrupt: parquet shard: ")
    assert "-11 rows" in image.problem


def test_a_column_longer_than_what_is_read_at_a_time_is_read_in_parts(tmp_path, monkeypatch):
    values = [bytes([number]) * 10 * 1024**2 for number in range(7)]
    pq.write_table(
        pa.table({"image": binary(values)}), tmp_path / "t.parquet", compression="none",
        use_dictionary=False,
    )  # fmt: skip
    asked = []

    class Watched(LocalStore):
        def read(self, path, start=0, length=None, etag=None):
            asked.append(length)
            return super().read(path, start, length, etag)

    store = Watched(tmp_path)
    answers = fetched(store, planned(store), limit=2**26)

    assert [answer.data for answer in answers] == values
    assert max(asked) <= 45 * 1024**2  # a part, or a page that goes beyond it


def test_column_names_are_tried_in_the_documented_order():
    assert COLUMNS[:3] == ("image", "img", "image_bytes")


# -- a shard that is written while it is read ----------------------------------------------------


class Restless(LocalStore):
    """Every object is written again right after it was listed."""

    def list(self, prefix=""):
        for found in super().list(prefix):
            path = self.root / found.path
            path.write_bytes(path.read_bytes())
            yield found


SHARDS = pytest.mark.parametrize(
    ("name", "data"),
    [("s.tar", tar_of({"a.png": PICTURES[0]})), ("t.parquet", parquet_of(PICTURES))],
)


@SHARDS
def test_a_shard_that_changes_while_it_is_indexed_is_one_rejected_row(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)

    (image,) = planned(Restless(tmp_path))

    assert image.key == name
    assert image.problem.startswith("changed: ")


class Locked(LocalStore):
    """Every object can be listed, and none read."""

    def read(self, path, start=0, length=None, etag=None):
        raise ObjectUnreadable(f"{path}: Permission denied")


@SHARDS
def test_a_shard_that_cannot_be_read_is_one_rejected_row(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)

    (image,) = planned(Locked(tmp_path), shard_format(name))

    assert image.key == name
    assert image.problem.startswith("unreadable: ")


def shard_format(name: str) -> str:
    return "webdataset" if name.endswith(".tar") else "parquet"


@pytest.mark.parametrize("name", ["a.png", "s.tar", "t.parquet"])
def test_an_image_that_cannot_be_read_any_more_is_unreadable(tmp_path, name):
    data = {"a.png": PICTURES[0], "s.tar": tar_of({"a.png": PICTURES[0]})}
    (tmp_path / name).write_bytes(data.get(name, parquet_of(PICTURES[:1])))
    images = planned(LocalStore(tmp_path))

    (answer,) = fetched(Locked(tmp_path), images)

    assert (answer.data, answer.verdict.reason) == (None, "unreadable")


FETCHES = """
import sys
from pathlib import Path
from pipeline.formats import parquet
from pipeline.storage import LocalStore
from tests.contracts.formats import planned
store = LocalStore(Path(sys.argv[1]))
images = planned(store, "parquet")
sizes = {len(one.data) for one in parquet.fetch(store, images, 1, limit=2**26)}
# not ru_maxrss: a child has that of the parent it was forked from
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(len(images), *sizes, int(peak) // 1024)
"""


def test_one_large_value_that_all_rows_repeat_is_not_held_once_a_row(tmp_path):
    value = bytes(40 * 1024**2)
    column = pa.array([value], pa.binary()).dictionary_encode().take(pa.array([0] * 16))
    table = pa.table({"image": pa.DictionaryArray.from_arrays(column.indices, column.dictionary)})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "t.parquet").stat().st_size < 100_000

    told = subprocess.run(
        [sys.executable, "-c", FETCHES, tmp_path],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip

    rows, size, peak_mb = map(int, told.stdout.split())
    assert (rows, size) == (16, len(value))
    assert peak_mb < 450  # all at once are 640 and more; 210 have been seen
