"""What a run knows of its images: which are listed as they were, and which are left over."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.known import SCHEMA, Known

names = st.text("abc/#%é", min_size=1, max_size=4)
images = st.dictionaries(names, st.sampled_from(["e1", "e2", "e3"]), max_size=12)


class Table:
    """An images table in small parts; remembers what was asked of it."""

    def __init__(self, images, reasons=None, part: int = 3) -> None:
        rows = [
            {"key": key, "image_id": number, "etag": etag, "reason": (reasons or {}).get(key)}
            for number, (key, etag) in enumerate(images.items())
        ]
        self.table, self.part, self.asked = pa.Table.from_pylist(rows, SCHEMA), part, []

    def __call__(self, columns):
        self.asked.append(list(columns))
        table = self.table.select(sorted(columns))  # a Parquet file has an order of its own
        return iter(table.to_batches(self.part))


def listed(known: Known, now) -> list[str]:
    """Keys that are not as they were."""
    same = known.unchanged(list(now), list(now.values()))
    return [key for key, unchanged in zip(now, same, strict=True) if not unchanged]


@given(images, images)
def test_an_image_is_unchanged_if_key_and_etag_are(then, now):
    known = Known(Table(then))

    assert len(known) == len(then)
    assert listed(known, now) == [key for key in now if now[key] != then.get(key)]
    assert known.others()["key"].to_pylist() == [key for key in then if then[key] != now.get(key)]


@given(images)
def test_it_does_not_matter_how_a_listing_is_divided(then):
    known = Known(Table(then))
    for key in sorted(then):
        assert listed(known, {key: then[key]}) == []
    assert known.others().num_rows == 0


def test_the_table_is_read_again_only_for_images_that_were_not_met():
    table = Table({"a": "e1", "b": "e1"})
    known = Known(table)
    listed(known, {"a": "e1", "b": "e1", "c": "e1"})

    assert known.others() == SCHEMA.empty_table()
    assert table.asked == [["key", "etag"]]


def test_what_is_tried_again_counts_as_changed():
    then = {"a": "e1", "b": "e1", "c": "e1"}
    known = Known(Table(then, {"a": "timeout", "b": "corrupt"}), retry=["timeout"])

    assert listed(known, then) == ["a"]
    assert known.others().to_pylist() == [
        {"key": "a", "image_id": 0, "etag": "e1", "sha256": None, "reason": "timeout"}
    ]


def test_nothing_is_known_of_a_first_round():
    known = Known()

    assert len(known) == 0
    assert listed(known, {"a": "e1"}) == ["a"]
    assert known.others() == SCHEMA.empty_table()
