"""Strips: all rows once, in order, none small."""

import pytest

from models.parts.strips import spans


@pytest.mark.parametrize("each", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("length", [1, 2, 3, 13, 14, 15, 99, 1000])
def test_strips_are_of_one_size_and_the_last_takes_what_is_left(length, each):
    found = spans(length, each)

    assert [row for start, stop in found for row in range(start, stop)] == list(range(length))
    sizes = [stop - start for start, stop in found]
    assert set(sizes[:-1]) <= {max(1, each)}
    assert min(max(1, each), length) <= sizes[-1] < 2 * max(1, each) or len(sizes) == 1


def test_no_rows_are_no_strips():
    assert spans(0, 5) == []
