"""The one object of a fragment: what goes in comes out, for us and for zarr, and damage shows."""

import json
import struct

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fragment import (
    CLASS_STATS,
    DETAIL,
    HEAD,
    IMAGES,
    MAGIC,
    FragmentDamaged,
    assemble,
    check_data,
    compress,
    decompress,
    header_nbytes,
    read_header,
    read_index,
    slots_of,
)
from pipeline.layout import Layout
from pipeline.tables import read_table

FILL = 255
N_SLOTS = 16
CHUNK = 64


def rows_of(masks) -> tuple[pa.Table, pa.Table]:
    images, stats = [], []
    for number, mask in enumerate(masks):
        row = dict.fromkeys((*IMAGES.names, DETAIL.name))
        row |= {"image_id": number, "key": f"{number}ä.jpg", "uri": "u", "status": "done"}
        row |= {"etag": "e", "fragment": 0, "height": mask.shape[0], "width": mask.shape[1]}
        images.append({**row, "model_version": "m@1"})
        stats.append({"image_id": number, "class_id": 1, "pixel_count": mask.size, "fraction": 1.0})
    schema = IMAGES.append(DETAIL)
    return pa.Table.from_pylist(images, schema), pa.Table.from_pylist(stats, CLASS_STATS)


def object_of(masks, n_slots=N_SLOTS, **about) -> bytes:
    frames = [frame for mask in masks for frame in slots_of(mask, CHUNK, FILL)]
    about = {"fragment": 3, "token": "t", **about}
    return assemble(about, *rows_of(masks), frames, range(len(frames)), n_slots)


masks = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16)).map(
        lambda p: np.random.default_rng(p[2]).integers(0, 4, p[:2]).astype(np.uint8)
    ),
    max_size=4,
)
GOOD = object_of([np.arange(90, dtype=np.uint8).reshape(9, 10), np.zeros((3, 5), np.uint8)])


@given(masks, st.text(max_size=20))
def test_everything_that_goes_in_comes_out(written, note):
    data = object_of(written, note=note)

    header = read_header(data)
    check_data(data, header)

    images, stats = rows_of(written)
    assert header.images.equals(images)
    assert header.class_stats.equals(stats)
    assert header.about["note"] == note
    spans = read_index(data, N_SLOTS).tolist()
    at = 0
    for mask in written:
        count = -(-mask.size // CHUNK)
        flat = np.concatenate(
            [decompress(data[o : o + n], "uint8") for o, n in spans[at : at + count]]
        )
        assert np.array_equal(flat[: mask.size].reshape(mask.shape), mask)
        assert np.all(flat[mask.size :] == FILL)
        at += count
    assert all(span == [2**64 - 1, 2**64 - 1] for span in spans[at:])


def test_the_byte_layout_is_the_documented_one():
    room, tables = struct.unpack("<II", GOOD[8:16])
    about = json.loads(GOOD[HEAD : HEAD + room])
    body = GOOD[HEAD + room :]

    assert GOOD[:8] == MAGIC == b"MSKFRAG1"
    assert read_table(body[slice(*about["images"])]).num_rows == 2
    assert read_table(body[slice(*about["class_stats"])]).num_rows == 2
    assert about["class_stats"][1] == tables
    frames = -(-(HEAD + room + tables) // 64) * 64
    assert GOOD[HEAD + room + tables : frames] == bytes(frames - HEAD - room - tables)
    assert header_nbytes(GOOD[:HEAD]) == frames
    assert read_header(GOOD).nbytes == frames
    assert read_index(GOOD, N_SLOTS)[0, 0] == frames
    assert GOOD[frames : frames + 4] == b"\x28\xb5\x2f\xfd"  # a zstd frame
    assert about["format_version"] == 1


@given(st.integers(0, 10**9), st.text(max_size=40))
def test_the_lengths_are_right_however_long_the_checksums_are(number, token):
    data = object_of([np.full((2, 2), 1, np.uint8)], number=number, token=token)

    assert read_header(data).about["number"] == number
    assert decompress(data[slice(*_span(data, 0))], "uint8")[0] == 1


def _span(data, slot) -> tuple[int, int]:
    start, nbytes = read_index(data, N_SLOTS)[slot].tolist()
    return start, start + nbytes


@settings(max_examples=25)
@given(masks)
def test_zarr_reads_the_same_pixels(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("zarr")
    layout = Layout("flat", "uint8", FILL, N_SLOTS, CHUNK)
    (folder / "c").mkdir()
    (folder / "zarr.json").write_bytes(layout.array_json(2, {"flag_values": [0, 1]}))
    (folder / "c/1").write_bytes(object_of(written))

    array = zarr.open_array(folder, mode="r")

    assert array.shape == (2 * N_SLOTS * CHUNK,)
    at = N_SLOTS * CHUNK
    for mask in written:
        assert np.array_equal(array[at : at + mask.size].reshape(mask.shape), mask)
        at += -(-mask.size // CHUNK) * CHUNK
    assert np.all(array[: N_SLOTS * CHUNK] == FILL)  # a fragment that is not there yet


def test_zarr_reads_16_bit_masks(tmp_path):
    values = np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)
    frames = slots_of(values, CHUNK, 65535)
    layout = Layout("flat", "uint16", 65535, N_SLOTS, CHUNK)
    (tmp_path / "c").mkdir()
    (tmp_path / "zarr.json").write_bytes(layout.array_json(1, {}))
    (tmp_path / "c/0").write_bytes(assemble({}, *rows_of([values]), frames, [0], N_SLOTS))

    array = zarr.open_array(tmp_path, mode="r")

    assert np.array_equal(array[:60].reshape(6, 10), values)
    assert np.all(array[60:] == 65535)


def checked(data) -> None:
    """All that `verify` does with an object before it compares numbers."""
    header = read_header(data)
    check_data(data, header)
    for start, nbytes in read_index(data, N_SLOTS).tolist():
        if nbytes != 2**64 - 1:
            decompress(data[start : start + nbytes], "uint8")


def test_any_single_flipped_byte_is_found():
    checked(GOOD)
    for position in range(0, len(GOOD), 7):
        damaged = bytearray(GOOD)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(FragmentDamaged):
            checked(bytes(damaged))


def test_any_cut_is_found():
    for size in [*range(64), *range(64, len(GOOD), 31), len(GOOD) - 1]:
        with pytest.raises(FragmentDamaged):
            checked(GOOD[:size])


@given(st.binary(max_size=300))
def test_noise_is_damage_and_nothing_worse(noise):
    for data in (noise, MAGIC + noise, GOOD[:HEAD] + noise):
        with pytest.raises(FragmentDamaged):
            checked(data)


def test_a_damaged_frame_is_found_by_its_own_checksum():
    frame = bytearray(compress(np.arange(200, dtype=np.uint8)))
    frame[len(frame) // 2] ^= 4

    with pytest.raises(FragmentDamaged, match="zstd"):
        decompress(bytes(frame), "uint8")


def test_the_tables_columns_and_types_are_frozen():
    assert [(f.name, str(f.type), f.nullable) for f in IMAGES] == [
        ("image_id", "int64", False), ("key", "string", False), ("uri", "string", False),
        ("status", "string", False), ("station", "string", True), ("reason", "string", True),
        ("height", "int32", True), ("width", "int32", True), ("input_bytes", "int64", True),
        ("etag", "string", False), ("sha256", "string", True), ("fragment", "int32", False),
        ("pixel_start", "int64", True), ("mask_index", "int64", True), ("path", "string", True),
        ("byte_offset", "int64", True), ("byte_nbytes", "list<item: int32>", True),
        ("nodata_pixels", "int64", True), ("seam_score", "float", True),
        ("mean_confidence", "float", True), ("model_version", "string", False),
    ]  # fmt: skip
    assert [(f.name, str(f.type), f.nullable) for f in CLASS_STATS] == [
        ("image_id", "int64", False), ("class_id", "uint16", False),
        ("pixel_count", "int64", False),
        ("fraction", "float", False), ("mean_confidence", "float", True),
    ]  # fmt: skip
