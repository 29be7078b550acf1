"""The model's answers: never a matter of batch mates, memory or strips; nodata never counts."""

import re
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from pipeline import finishing, infer
from pipeline.batch import pack
from pipeline.config import Inference
from pipeline.errors import RunRefused
from pipeline.finishing import upsampled
from pipeline.infer import Segmenter
from pipeline.records import Pixels, PlannedImage
from pipeline.tile import Grid, Picture, cut, stitch
from tests.bundles import files_of, tiny_bundle, window_segmenter
from tests.pictures import blobs

SIZES = [(1, 1), (3, 5), (64, 64), (33, 47), (40, 200), (64, 60), (64, 64), (2, 90), (150, 150)]
GRID = Grid(256, 32, 4, "gaussian", None, 4)


@pytest.fixture(scope="module")
def segmenter(tiny_bundle):
    return Segmenter(*files_of(tiny_bundle), "cpu")


def picture(height, width, seed, channels=3, dtype=np.uint8, nodata=None, grid=GRID) -> Picture:
    values = blobs(height, width, seed)[..., :channels]
    if dtype == np.uint16:
        values = values.astype(np.uint16) << 8
    plan = PlannedImage(seed, str(seed), "", None, None, 0, "", "files", 0)
    pixels = Pixels(np.ascontiguousarray(values), nodata)
    return Picture(
        plan,
        pixels,
        0,
        "",
        large=False,
        rows=grid.offsets(height),
        columns=grid.offsets(width),
    )


def pictures(nodata=False) -> list[Picture]:
    """Gray and RGB, 8 and 16 bit, of mixed sizes; the first of each class of size with holes."""
    kinds = [(3, np.uint8), (1, np.uint8), (1, np.uint16)]
    made = []
    for number, (height, width) in enumerate(SIZES * 2):
        channels, dtype = kinds[number % 3]
        holes = np.random.default_rng(number).random((height, width)) < 0.3 if nodata else None
        made.append(picture(height, width, number, channels, dtype, holes))
    return made


def answers(segmenter, chosen, budget, confidence=True) -> dict[int, object]:
    batches = pack(cut(chosen, GRID), budget, 10**9, segmenter.model.stride)
    return {a.tile.picture.plan.image_id: a.rows for a in segmenter.predict(batches, confidence)}


def assert_same(one, other):
    assert np.array_equal(one.labels_HW, other.labels_HW)
    assert one.labels_HW.dtype == other.labels_HW.dtype
    assert np.array_equal(one.confidence_HW, other.confidence_HW)
    assert np.array_equal(one.counts_K, other.counts_K)
    assert np.array_equal(one.confidences_K, other.confidences_K)


# -- batch mates ---------------------------------------------------------------------------------


def test_an_answer_in_a_batch_equals_the_answer_alone_bit_for_bit(segmenter):
    chosen = pictures(nodata=True)
    together = answers(segmenter, chosen, 10**9)
    assert len(together) == len(chosen)

    for one in chosen:
        (alone,) = answers(segmenter, [one], 1).values()
        assert_same(alone, together[one.plan.image_id])


def test_the_order_and_the_budget_do_not_matter(segmenter):
    chosen = pictures()
    together = answers(segmenter, chosen, 10**9)

    for other in (
        answers(segmenter, chosen[::-1], 10**9),
        answers(segmenter, chosen, 3 * 64 * 64),
        answers(segmenter, chosen[::2] + chosen[1::2], 200 * 200),
    ):
        for image_id, rows in together.items():
            assert_same(rows, other[image_id])


def test_the_answer_is_the_models_own(segmenter):
    for one in pictures():
        (rows,) = answers(segmenter, [one], 1).values()
        expected, sure = by_hand(segmenter, one)
        assert rows.labels_HW.shape == (one.pixels.height, one.pixels.width)
        assert (rows.labels_HW != expected).mean() <= 1e-3  # rounding, where two scores are equal
        np.testing.assert_allclose(rows.confidence_HW / 255, sure, atol=1 / 255)


def by_hand(segmenter, one):
    """The same without any of our code between picture and network."""
    values = one.pixels.values_HWC.astype(np.float64) / np.iinfo(one.pixels.values_HWC.dtype).max
    x_HWC = ((np.repeat(values, 3 // values.shape[2], axis=2) - 0.2) / 0.25).astype(np.float32)
    height, width = max(4, len(x_HWC)), max(4, x_HWC.shape[1])
    x_HWC = np.pad(x_HWC, ((0, height - len(x_HWC)), (0, width - x_HWC.shape[1]), (0, 0)))
    with torch.inference_mode():
        logits = segmenter.model(torch.from_numpy(x_HWC).permute(2, 0, 1)[None])[0]
    logits = logits[:, : one.pixels.height, : one.pixels.width]
    sure, index = logits.softmax(0).max(0)
    return index.numpy(), sure.numpy()


# -- classes and holes ---------------------------------------------------------------------------


def test_class_ids_need_not_be_places_in_the_scores(tmp_path, segmenter):
    named = Segmenter(*files_of(tiny_bundle(tmp_path, ids=(200, 7))), "cpu")
    chosen = pictures(nodata=True)
    plain, other = answers(segmenter, chosen, 10**9), answers(named, chosen, 10**9)

    for image_id, rows in plain.items():
        expected = np.select([rows.labels_HW == 0, rows.labels_HW == 1], [200, 7], 255)
        assert np.array_equal(other[image_id].labels_HW, expected)
        assert np.array_equal(other[image_id].counts_K, rows.counts_K)


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_a_gpu_counts_as_a_cpu_does(classes):
    draws = torch.Generator().manual_seed(classes)
    index_BHW = torch.randint(0, classes - 1, (2, 37, 53), generator=draws).to(torch.uint8)
    index_BHW[1, :5, :7] = 255  # no data
    sure_BHW = torch.rand(2, 37, 53, generator=draws)

    counts_BK, sums_BK = finishing.counted(index_BHW, sure_BHW, classes)

    there = finishing.counted_on_gpu(index_BHW, sure_BHW, classes)
    assert counts_BK.sum(1).tolist() == [37 * 53, 37 * 53 - 35]
    assert torch.equal(counts_BK, there[0])
    torch.testing.assert_close(sums_BK, there[1])


def test_nodata_is_neither_classified_nor_counted(segmenter):
    for one in pictures(nodata=True):
        (rows,) = answers(segmenter, [one], 1).values()
        holes = one.pixels.nodata_HW
        assert np.array_equal(rows.labels_HW == 255, holes)
        assert np.all(rows.confidence_HW[holes] == 0)
        assert rows.counts_K.sum() == (~holes).sum()
        for k in range(2):
            assert rows.counts_K[k] == (rows.labels_HW == k).sum()


def test_a_picture_without_any_data_has_a_mask_and_no_counts(segmenter):
    (rows,) = answers(segmenter, [picture(20, 30, 0, nodata=np.ones((20, 30), bool))], 1).values()

    assert np.all(rows.labels_HW == 255)
    assert rows.counts_K.tolist() == [0, 0]
    assert rows.confidences_K.tolist() == [0.0, 0.0]


def test_a_gray_model_reads_colour_as_luma(tmp_path):
    gray = Segmenter(*files_of(tiny_bundle(tmp_path, channels=1)), "cpu")
    colour = picture(64, 64, 3)
    luma = (colour.pixels.values_HWC @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    same = replace(colour, pixels=Pixels(luma[..., None], None))

    (one,), (other,) = (answers(gray, [p], 1).values() for p in (colour, same))

    assert (one.labels_HW != other.labels_HW).mean() < 0.02  # rounding to 8 bits, nothing more


def test_16_bit_and_8_bit_of_the_same_picture_get_nearly_the_same_mask(segmenter):
    (narrow,) = answers(segmenter, [picture(96, 96, 3, 1)], 1).values()
    (wide,) = answers(segmenter, [picture(96, 96, 3, 1, np.uint16)], 1).values()

    assert (narrow.labels_HW != wide.labels_HW).mean() < 0.02


def test_the_bundles_range_is_for_16_bits_alone_and_clips(tmp_path, segmenter):
    ranged = Segmenter(*files_of(tiny_bundle(tmp_path, limits=(1000, 3000))), "cpu")
    plain = picture(64, 64, 3, 1)
    values = plain.pixels.values_HWC

    def mask(one, made):
        (rows,) = answers(made, [one], 1).values()
        return rows.labels_HW

    def of(array):
        return replace(plain, pixels=Pixels(array, None))

    assert np.array_equal(mask(plain, ranged), mask(plain, segmenter))
    twelve_bits = (1000 + values.astype(np.float64) * 2000 / 255).round().astype(np.uint16)
    assert (mask(of(twelve_bits), ranged) != mask(plain, segmenter)).mean() < 0.02
    beyond = twelve_bits.copy()
    beyond[values == 255] = 60_000
    beyond[values == 0] = 0
    assert np.array_equal(mask(of(beyond), ranged), mask(of(twelve_bits), ranged))


# -- memory --------------------------------------------------------------------------------------


def test_running_out_of_memory_splits_the_batch_and_is_remembered(tiny_bundle):
    segmenter = Segmenter(*files_of(tiny_bundle), "cpu")
    chosen = [picture(64, 64, seed) for seed in range(16)]
    expected = answers(segmenter, chosen, 10**9)
    sizes, run = [], segmenter._run

    def small_memory(tiles, *arguments):
        sizes.append(len(tiles))
        if len(tiles) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tiles, *arguments)

    segmenter._run = small_memory

    for image_id, rows in answers(segmenter, chosen, 10**9).items():
        assert_same(rows, expected[image_id])
    assert sizes == [16, 8, 4, 4, 8, 4, 4]

    sizes.clear()
    answers(segmenter, chosen, 10**9)
    assert sizes == [4, 4, 4, 4]


def test_what_a_failed_batch_has_held_is_free_when_its_halves_are_tried(tiny_bundle):
    segmenter = Segmenter(*files_of(tiny_bundle), "cpu")
    run, alive = segmenter._run, weakref.WeakSet()

    class Held:
        """What a batch takes of the memory."""

    def small_memory(tiles, *arguments):
        held = [Held() for _ in tiles]
        alive.update(held)
        if len(alive) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(tiles, *arguments)

    segmenter._run = small_memory

    found = answers(segmenter, [picture(64, 64, seed) for seed in range(16)], 10**9)

    assert len(found) == 16
    assert all(rows is not None for rows in found.values())


@pytest.mark.parametrize(
    ("said", "raised"),
    [("[enforce fail at alloc_cpu.cpp] can't allocate memory: you tried", MemoryError),
     ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", MemoryError),
     ("shapes do not match", RuntimeError)],
)  # fmt: skip
def test_of_a_tiled_picture_torchs_want_of_memory_is_a_memory_error(tiny_bundle, said, raised):
    segmenter = Segmenter(*files_of(tiny_bundle), "cpu")

    def small_memory(*arguments):
        raise RuntimeError(said)

    segmenter._finish = small_memory

    scores_KGg = np.zeros((2, 16, 16), np.float32)
    with pytest.raises(raised, match=re.escape(said)):
        segmenter.finish(picture(64, 64, 1), scores_KGg, 0, (16, 16), 0, 64, confidence=False)


def test_one_tile_that_does_not_fit_is_a_failure_of_its_own(tiny_bundle):
    segmenter = Segmenter(*files_of(tiny_bundle), "cpu")
    run = segmenter._run

    def small_memory(tiles, *arguments):
        if any(tile.picture.plan.image_id == 3 for tile in tiles):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory: you tried")
        return run(tiles, *arguments)

    segmenter._run = small_memory
    batches = pack(cut([picture(64, 64, s) for s in range(6)], GRID), 10**9, 10**9, 4)
    said = segmenter.predict(batches, confidence=False)
    failures = {a.tile.picture.plan.image_id: a.failure for a in said}

    assert failures.pop(3) == "one tile of 64 x 64 pixels does not fit the memory"
    assert set(failures.values()) == {None}


def test_any_other_error_is_not_taken_for_lack_of_memory(tiny_bundle):
    segmenter = Segmenter(*files_of(tiny_bundle), "cpu")

    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    segmenter._run = broken

    with pytest.raises(RuntimeError, match="mat1"):
        answers(segmenter, [picture(64, 64, 0)], 1)


def test_a_probe_finds_a_budget_of_whole_probe_pictures(segmenter):
    assert segmenter.probe() % infer.PROBE_SIDE**2 == 0


# -- strips --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "size"),
    [
        ((16, 12), (64, 48)),
        ((16, 12), (67, 51)),
        ((1, 1), (4, 4)),
        ((1, 9), (5, 38)),
        ((7, 3), (7, 3)),
    ],
)
def test_strips_are_up_sampled_as_torch_would_up_sample_the_whole(cells, size):
    scores = torch.randn(3, *cells, generator=torch.Generator().manual_seed(0))
    whole = interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]

    for step in (1, 3, size[0]):
        rows = [
            upsampled(scores, 0, cells, size, y, min(y + step, size[0]))
            for y in range(0, size[0], step)
        ]
        torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-5, atol=1e-5)


def test_a_picture_finished_in_strips_equals_one_finished_whole(segmenter, monkeypatch):
    chosen = pictures(nodata=True)
    whole = answers(segmenter, chosen, 10**9)

    monkeypatch.setattr(finishing, "STRIP", 2000)

    for image_id, rows in answers(segmenter, chosen, 10**9).items():
        assert np.array_equal(rows.labels_HW, whole[image_id].labels_HW)
        assert np.array_equal(rows.confidence_HW, whole[image_id].confidence_HW)
        assert np.array_equal(rows.counts_K, whole[image_id].counts_K)
        np.testing.assert_allclose(rows.confidences_K, whole[image_id].confidences_K)


# -- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("taper", ["gaussian", "linear"])
@pytest.mark.parametrize("size", [(200, 340), (321, 97), (163, 165)])
def test_a_tiled_picture_equals_the_untiled_one_where_the_field_is_finite(tiny_bundle, taper, size):
    made = window_segmenter(files_of(tiny_bundle))
    holes = np.zeros(size, bool)
    holes[5:40, 7:60] = True

    def mask(grid):
        one = picture(*size, 11, nodata=holes, grid=grid)
        assert one.tiled == (grid.size < 400)
        batches = pack(cut([one], grid), 2 * 96 * 96, 10**9, 4)
        finish = partial(made.finish, confidence=True)
        strips = list(stitch(made.predict(batches, confidence=True), grid, finish))
        if one.tiled:
            assert strips[-1].seam_score == 0.0
        assert sum(s.rows.counts_K.sum() for s in strips) == (~holes).sum()
        return tuple(
            np.concatenate([getattr(s.rows, name) for s in strips])
            for name in ("labels_HW", "confidence_HW")
        )

    labels, sure = mask(Grid(96, 48, 4, taper, made.model.receptive_field, 4))
    whole_labels, whole_sure = mask(Grid(400, 48, 4, taper, made.model.receptive_field, 4))

    assert 0.05 < (whole_labels[~holes] == 1).mean() < 0.95
    assert (labels != whole_labels).mean() < 1e-4  # averages of equal scores may round
    assert np.abs(sure.astype(int) - whole_sure).max() <= 1


# -- refusals ------------------------------------------------------------------------------------


def test_a_model_that_answers_fewer_cells_than_it_says_is_refused(tiny_bundle):
    segmenter = Segmenter(*files_of(tiny_bundle), "cpu")
    grid = segmenter.model.grid
    segmenter.model.grid = lambda x_BCHW, sizes: grid(x_BCHW, sizes)[:, :, 1:]

    with pytest.raises(RunRefused, match=r"answers \(63, 64\) cells .* not \(64, 64\)"):
        segmenter.probe()


def test_a_tile_larger_than_the_model_reads_is_refused_with_the_way_out(tiny_bundle):
    segmenter = Segmenter(*files_of(tiny_bundle), "cpu")
    segmenter.model.max_side = 32

    with pytest.raises(ValueError, match="sides of up to 32; cut the picture into tiles"):
        answers(segmenter, [picture(40, 30, 0)], 2**16)


def test_a_bundle_that_is_none_is_refused(tiny_bundle):
    card, weights = files_of(tiny_bundle)

    for files in ((b"{}", weights), (card, weights[:-1]), (card, b"\x80\x04pickle")):
        with pytest.raises(RunRefused, match="bundle cannot be used"):
            Segmenter(*files, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(tiny_bundle):
    with pytest.raises(RunRefused, match="use auto or cpu"):
        Segmenter(*files_of(tiny_bundle), "cuda")


def test_half_precision_changes_few_labels(tiny_bundle, segmenter):
    half = Segmenter(*files_of(tiny_bundle), "cpu", inference=Inference(precision="bf16"))
    chosen = [picture(90, 120, 3), picture(150, 150, 4)]

    exact, found = (answers(made, chosen, 2**16) for made in (segmenter, half))

    assert half.model.widen.weight.dtype == torch.bfloat16
    for image_id, rows in exact.items():
        differ = (rows.labels_HW != found[image_id].labels_HW).mean()
        assert differ < 0.05
        assert np.abs(rows.confidence_HW.astype(int) - found[image_id].confidence_HW).mean() < 8


def test_a_model_that_torch_does_not_run_is_not_compiled(tiny_bundle, monkeypatch):
    monkeypatch.setattr("models.latent_attention.FoldedPlus.compiles", False, raising=False)

    with pytest.raises(RunRefused, match="latent_attention is not run by torch; drop it"):
        Segmenter(*files_of(tiny_bundle), "cpu", inference=Inference(compile=True))
