"""Parts of a training travel as rows and come out as they were."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from ray.data.block import BlockAccessor

from pipeline import part_rows
from pipeline.part_rows import Steps, made, part_of
from pipeline.trainset import Part, TrainSet

REJECTED = (
    ("a/\x1e;#1.png", "decode", "corrupt", 'said "no"\n\x1f'),
    ("\udcff.png", "fetch", "vanished", "it ends here\0"),
)


class Numbered:
    """A set of pictures whose parts say which they are."""

    def part(self, step: int, slot: int, parts: int) -> Part:
        pixels_BhwC = np.full((2, 3, 4, 1), 10 * step + slot, np.uint8)
        rejected = REJECTED if (step, slot) == (5, 1) else ()
        return Part(step, pixels_BhwC, np.full((2, 3, 4), parts, np.uint8), rejected)


def there(row: dict) -> dict:
    """A row on the other side of a stream."""
    return BlockAccessor.for_block(BlockAccessor.batch_to_block(row)).to_numpy()


# Ray warns of fields of its own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
def test_a_stretch_of_steps_is_a_row_for_every_part_which_comes_back_as_it_was(monkeypatch):
    monkeypatch.setattr(part_rows.ray, "get", lambda held: held)
    row = {"begin": np.array([4]), "end": np.array([7])}

    rows = made(row, Steps(cast("TrainSet", Numbered()), 2), "{}")
    parts = [part_of(there(row)) for row in rows]

    assert [(part.step, part.pixels_BhwC.max()) for part in parts] == [
        (4, 40), (4, 41), (5, 50), (5, 51), (6, 60), (6, 61),
    ]  # fmt: skip
    assert [part.rejected for part in parts] == [(), (), (), REJECTED, (), ()]
    for part in parts:
        expected = Numbered().part(part.step, 0, 2)
        assert part.pixels_BhwC.shape == expected.pixels_BhwC.shape
        np.testing.assert_array_equal(part.labels, expected.labels)
