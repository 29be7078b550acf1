"""Cut and stitch undo each other, for any size, stride and overlap."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import Pixels, PlannedImage
from pipeline.tile import Grid, Picture, Rows, TileAnswer, cut, first_row_reading, stitch, taper

RADIUS = 2  # cells around a cell that the stand-in looks at
STRIDE = 4
FIELD = (2 * RADIUS + 1) * STRIDE


def grid_of(size=64, overlap=32, stride=STRIDE, shape="gaussian", field=FIELD) -> Grid:
    return Grid(size, overlap, stride, shape, field, stride)


def picture_of(height: int, width: int, grid: Grid, image_id: int = 0) -> Picture:
    plan = PlannedImage(image_id, f"{image_id}", "", None, None, 0, "", "files", 0)
    values = np.random.default_rng(image_id + height * width).integers(
        0, 255, (height, width, 1), np.uint8
    )
    return Picture(
        plan,
        Pixels(values, None),
        0,
        "",
        large=False,
        rows=grid.offsets(height),
        columns=grid.offsets(width),
    )


def scored(values_HWC: np.ndarray) -> np.ndarray:
    """Scores_KGg of a network that looks at 5 x 5 cells of 4 pixels and at nothing else."""
    height, width = (max(1, side // STRIDE) for side in values_HWC.shape[:2])
    cells = values_HWC[: height * STRIDE, : width * STRIDE, 0].astype(np.float64)
    gray = cells.reshape(height, STRIDE, width, STRIDE).mean((1, 3)) - 127
    padded = np.pad(gray, RADIUS)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * RADIUS + 1,) * 2)
    mean = windows.mean((2, 3))
    return np.stack([-mean, mean, np.abs(mean) - 20]).astype(np.float32)


def repeated(picture, scores_KGg, g0, cells, y0, y1) -> Rows:
    """A finish that repeats each cell, so that rows are easy to compare."""
    height, width = picture.pixels.height, picture.pixels.width
    at = np.arange(y0, y1) * cells[0] // height - g0
    across = np.arange(width) * cells[1] // width
    labels = scores_KGg.argmax(0)[at][:, across].astype(np.uint8)
    return Rows(labels, None, np.bincount(labels.ravel(), minlength=3), np.zeros(3))


def answered(pictures, grid, model=scored):
    for tile in cut(pictures, grid):
        yield TileAnswer(tile, scores_KGg=model(tile.values_HWC))


def whole(picture) -> np.ndarray:
    scores = scored(picture.pixels.values_HWC)
    return repeated(picture, scores, 0, scores.shape[1:], 0, picture.pixels.height).labels_HW


# -- cutting -------------------------------------------------------------------------------------

grids = st.builds(
    lambda size, share, stride: Grid(size, int(size * share), stride, "gaussian", None, stride),
    st.integers(16, 200), st.floats(0, 0.5), st.sampled_from([1, 2, 4, 8]),
)  # fmt: skip


@given(grids, st.integers(1, 700), st.integers(1, 700))
def test_tiles_cover_everything_and_begin_on_the_stride(grid, height, width):
    picture = picture_of(1, 1, grid)
    picture = replace(
        picture,
        pixels=Pixels(np.broadcast_to(np.uint8(0), (height, width, 1)), None),
        rows=grid.offsets(height),
        columns=grid.offsets(width),
    )
    seen = np.zeros((height, width), bool)
    for tile in cut([picture], grid):
        assert tile.y % grid.stride == tile.x % grid.stride == 0
        assert 1 <= tile.height <= max(grid.size, grid.stride)
        assert 1 <= tile.width <= max(grid.size, grid.stride)
        assert tile.values_HWC.shape[:2] == (tile.height, tile.width)
        seen[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = True

    assert seen.all()


@given(grids, st.integers(1, 2000))
def test_neighbouring_tiles_share_the_overlap_at_least(grid, length):
    offsets = grid.offsets(length)
    size = grid.extent(0, length)

    assert list(offsets) == sorted(set(offsets))
    if len(offsets) > 1 and grid.overlap:
        steps = np.diff(offsets)
        assert steps.max() <= max(grid.stride, size - grid.overlap + grid.stride)


def test_a_picture_that_fits_is_one_tile():
    grid = grid_of(size=64)

    assert not picture_of(64, 64, grid).tiled
    assert picture_of(64, 65, grid).tiled


# -- stitching -----------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(20, 230), st.integers(20, 230), st.sampled_from(["gaussian", "linear"]))
def test_the_stitched_mask_equals_the_untiled_one_when_the_halo_covers_the_field(
    height, width, shape
):
    grid = grid_of(size=64, overlap=32, shape=shape)
    picture = picture_of(height, width, grid)
    if not picture.tiled:
        return

    strips = list(stitch(answered([picture], grid), grid, repeated))

    mask = np.concatenate([strip.rows.labels_HW for strip in strips])
    assert np.array_equal(mask, whole(picture))
    assert strips[-1].seam_score == 0.0


def test_strips_come_from_top_to_bottom_and_early():
    grid = grid_of()
    picture = picture_of(400, 100, grid)
    given_out = []
    answers = answered([picture], grid)

    def watched():
        for number, answer in enumerate(answers):
            given_out.append(number)
            yield answer

    rows = 0
    for number, strip in enumerate(stitch(watched(), grid, repeated)):
        assert strip.last == (rows + len(strip.rows.labels_HW) == 400)
        rows += len(strip.rows.labels_HW)
        if number == 0:
            assert len(given_out) == len(picture.columns)  # after the first row of tiles
            assert strip.seam_score is None
    assert rows == 400


def test_pictures_may_interleave_and_each_gets_its_own_scores():
    grid = grid_of()
    one, other = picture_of(100, 90, grid, 1), picture_of(130, 70, grid, 2)
    first, second = list(answered([one], grid)), list(answered([other], grid))
    mixed = [a for pair in zip(first, second, strict=False) for a in pair]
    mixed += first[len(second) :] + second[len(first) :]

    masks: dict[int, list] = {1: [], 2: []}
    for strip in stitch(mixed, grid, repeated):
        masks[strip.picture.plan.image_id].append(strip.rows.labels_HW)

    assert np.array_equal(np.concatenate(masks[1]), whole(one))
    assert np.array_equal(np.concatenate(masks[2]), whole(other))


def test_tiles_that_disagree_where_they_overlap_raise_the_seam_score():
    grid = grid_of(field=None)
    picture = picture_of(64, 128, grid)
    votes = iter([0, 1] * 100)

    def stubborn(values_HWC):
        scores = np.zeros((3, values_HWC.shape[0] // STRIDE, values_HWC.shape[1] // STRIDE))
        scores[next(votes)] = 1
        return scores.astype(np.float32)

    strips = list(stitch(answered([picture], grid, stubborn), grid, repeated))

    assert strips[-1].seam_score == 1.0
    alike = answered([picture], grid, lambda v: np.ones_like(scored(v)))
    agreeing = list(stitch(alike, grid, repeated))
    assert agreeing[-1].seam_score == 0.0


def test_without_a_finite_field_the_seam_score_lies_between():
    grid = grid_of(size=32, overlap=8, field=None)
    picture = picture_of(120, 120, grid)

    strips = list(stitch(answered([picture], grid), grid, repeated))

    assert 0 < strips[-1].seam_score < 1


def test_a_tile_that_failed_is_the_end_of_its_picture():
    grid = grid_of()
    picture = picture_of(30, 30, grid)
    (tile,) = cut([picture], grid)

    (strip,) = stitch([TileAnswer(tile, failure="no memory")], grid, repeated)

    assert (strip.rows, strip.failure, strip.last) == (None, "no memory", True)


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gaussian", "linear"])
@given(st.integers(8, 64), st.booleans(), st.booleans())
def test_weights_are_largest_inside_and_never_negative(shape, cells, before, after):
    weights = taper(cells, grid_of(shape=shape, size=cells * STRIDE, overlap=16), before, after)

    assert weights.min() >= 0
    assert weights.argmax() in {(cells - 1) // 2, cells // 2}
    assert before or weights[0] > 0  # the picture's own border has no neighbour to help
    assert after or weights[-1] > 0


@given(st.integers(2, 60), st.integers(1, 400), st.data())
def test_no_row_before_the_first_that_reads_a_cell_depends_on_it(cells, extra, data):
    height = cells + extra
    row = data.draw(st.integers(1, cells - 1))

    y = first_row_reading(row, cells, height)

    def place(pixel_row):  # on the grid, as half-pixel centres have it
        return max(0.0, (pixel_row + 0.5) * cells / height - 0.5)

    assert all(place(above) <= row - 1 for above in range(y))
    assert y == height or int(place(y)) + 1 >= row
