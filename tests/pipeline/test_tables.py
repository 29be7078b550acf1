"""Our own tables: what was written is read, and what was not is an error."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.tables import SEAL, TableDamaged, read_batches, read_rows, read_table, write_table

TABLE = pa.table({"key": [f"a/{number}.png" for number in range(9)], "pixels": range(9)})


def test_a_table_is_read_as_it_was_written_and_equal_tables_are_equal_bytes():
    data = write_table(TABLE)

    assert read_table(data).equals(TABLE)
    assert read_table(data, ["pixels"]).equals(TABLE.select(["pixels"]))
    assert read_rows(io.BytesIO(data), [7, 2]) == [TABLE.slice(n, 1).to_pylist()[0] for n in (7, 2)]
    assert write_table(TABLE) == data


def test_other_readers_see_a_note_and_nothing_else():
    data = io.BytesIO(write_table(TABLE))

    assert pq.read_table(data).equals(TABLE)
    assert SEAL.encode() in pq.read_metadata(data).metadata


@pytest.mark.parametrize("rows", [9, 0])
def test_every_bit_of_a_table_that_flips_is_an_error_or_changes_nothing(rows):
    table = TABLE.slice(0, rows)
    data = write_table(table)

    unlike = []
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        try:
            read = read_table(bytes(flipped))
        except TableDamaged:
            continue
        if not read.equals(table) or read.schema.names != table.schema.names:
            unlike.append(place)

    assert unlike == []


@pytest.mark.parametrize("length", [0, 3, 7, 8, 11, 100, -1])
def test_a_table_that_is_cut_is_damaged(length):
    data = write_table(TABLE)

    with pytest.raises(TableDamaged, match="not a readable Parquet table"):
        read_table(data[:length])


def test_a_footer_longer_than_what_is_read_at_first_is_compared_too():
    wide = pa.table({f"column {number}": [number] for number in range(900)})
    data = bytearray(write_table(wide))
    footer = int.from_bytes(data[-8:-4], "little")
    assert footer > 100_000
    assert read_table(bytes(data)).equals(wide)

    data[-8 - footer + 50] ^= 1

    with pytest.raises(TableDamaged, match="unlike its checksum"):
        list(read_batches(io.BytesIO(data), ["column 1"]))


def test_a_table_that_was_written_before_there_were_seals_is_read():
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)

    assert read_table(sink.getvalue()).equals(TABLE)
