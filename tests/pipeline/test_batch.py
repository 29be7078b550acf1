"""Batches: a function of the fragment alone, within their budget, fully used."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch import pack, padded
from pipeline.records import Pixels
from pipeline.tile import Picture, Tile

STRIDE = 4
sizes = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3]), st.booleans()),
    max_size=40,
)


def tiles_of(shapes) -> list[Tile]:
    made = []
    for height, width, channels, deep in shapes:
        zero = np.dtype("u2" if deep else "u1").type(0)
        pixels = Pixels(np.broadcast_to(zero, (height, width, channels)), None)
        picture = Picture(None, pixels, 0, "", large=False, rows=(0,), columns=(0,))
        made.append(Tile(picture, 0, 0, height, width))
    return made


def rough(batches) -> list[tuple]:
    return [(b.height, b.width, [id(t) for t in b.tiles]) for b in batches]


@given(sizes, st.integers(1, 300_000), st.integers(1, 400_000))
def test_the_same_tiles_always_make_the_same_batches(shapes, budget, window):
    tiles = tiles_of(shapes)

    assert rough(pack(iter(tiles), budget, window, STRIDE)) == rough(
        pack(iter(tiles), budget, window, STRIDE)
    )


@given(sizes, st.integers(1, 300_000), st.integers(1, 400_000))
def test_every_tile_is_in_one_batch_and_no_batch_is_over_budget(shapes, budget, window):
    tiles = tiles_of(shapes)

    batches = list(pack(tiles, budget, window, STRIDE))

    assert sorted(id(t) for b in batches for t in b.tiles) == sorted(map(id, tiles))
    assert all(b.pixels <= budget or len(b.tiles) == 1 for b in batches)
    for batch in batches:
        kinds = {(t.values_HWC.dtype, t.values_HWC.shape[2]) for t in batch.tiles}
        assert len(kinds) == 1  # one dtype and one number of channels
        assert all(padded(t.height, STRIDE) == batch.height for t in batch.tiles)
        assert all(padded(t.width, STRIDE) == batch.width for t in batch.tiles)


@given(sizes, st.integers(1, 300_000), st.integers(1, 400_000))
def test_tiles_of_one_shape_keep_their_order(shapes, budget, window):
    tiles = tiles_of(shapes)
    order = {id(tile): number for number, tile in enumerate(tiles)}
    seen: dict[tuple, list[int]] = {}
    for batch in pack(tiles, budget, window, STRIDE):
        for tile in batch.tiles:
            kind = (batch.height, batch.width, str(tile.values_HWC.dtype), tile.values_HWC.shape[2])
            seen.setdefault(kind, []).append(order[id(tile)])

    assert all(numbers == sorted(numbers) for numbers in seen.values())


@given(sizes, st.integers(1, 2000))
def test_no_more_than_the_window_waits(shapes, kilobytes):
    window, waiting, most = kilobytes * 1024, 0, 0
    tiles = tiles_of(shapes)

    def counted():
        nonlocal waiting, most
        for tile in tiles:
            most = max(most, waiting)
            waiting += tile.values_HWC.nbytes
            yield tile

    for batch in pack(counted(), 10**9, window, STRIDE):
        waiting -= sum(t.values_HWC.nbytes for t in batch.tiles)
    assert most <= window
    assert waiting == 0


def test_a_full_window_flushes_the_largest_group():
    small, large = (40, 40, 3, False), (200, 200, 3, False)
    tiles = tiles_of([small, large, small, large])
    window = sum(t.values_HWC.nbytes for t in tiles) - 1

    batches = list(pack(tiles, 10**9, window, STRIDE))

    assert [len(b.tiles) for b in batches] == [2, 2]
    assert [b.tiles[0].height for b in batches] == [200, 40]


def test_batches_are_filled_as_far_as_the_budget_goes():
    tiles = tiles_of([(64, 64, 3, False)] * 10)

    assert [len(b.tiles) for b in pack(tiles, 4 * 64 * 64, 10**9, STRIDE)] == [4, 4, 2]
    assert [len(b.tiles) for b in pack(tiles, 1, 10**9, STRIDE)] == [1] * 10


@given(st.integers(1, 20_000), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_padding_costs_an_eighth_and_a_step_at_most(length, stride):
    side = padded(length, stride)

    assert length <= side
    assert side % stride == 0
    assert side <= length * 1.125 + max(32, stride)
    assert padded(side, stride) == side


@given(st.integers(1, 5000), st.sampled_from([1, 4, 16]))
def test_padding_grows_with_the_side(length, stride):
    assert padded(length, stride) <= padded(length + 1, stride)
