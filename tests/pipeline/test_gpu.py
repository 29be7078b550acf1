"""What a GPU is given and gives back, batch by batch, played through on a CPU.

The device itself is asked in tests/gpu; here its queues are a fake that does everything at once.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pipeline.batch import pack
from pipeline.config import Inference
from pipeline.create import grid_of
from pipeline.infer import Segmenter
from pipeline.tile import cut, stitch
from tests.bundles import files_of, tiny_bundle
from tests.pipeline.test_infer import GRID, answers, picture, pictures


@dataclass
class Landed:
    """Answers that are there."""

    host: list[torch.Tensor]
    held_s: float = 0.25

    def arrived(self) -> list[torch.Tensor]:
        return self.host


class Straight:
    """Queues of a device that does at once what it is given."""

    pinned = captures = False

    def __init__(self) -> None:
        self.inside = False
        self.worked = self.given_back = 0

    def inward(self, host):
        assert not self.inside, "work must not wait for bytes in the middle"
        return host.clone()

    @contextmanager
    def working(self):
        self.inside = True
        yield
        self.inside = False
        self.worked += 1

    def outward(self, there):
        return Landed([each.clone() for each in there])

    def give_back(self):
        assert not self.inside
        self.given_back += 1


def assert_close(one, other):
    """The same but for rounding, which decides where two classes are level."""
    wrong = one.labels_HW != other.labels_HW
    assert one.labels_HW.dtype == other.labels_HW.dtype
    assert wrong.sum() <= max(1, 2e-3 * wrong.size)
    assert abs(one.counts_K - other.counts_K).sum() <= 2 * wrong.sum()
    np.testing.assert_allclose(one.confidences_K, other.confidences_K, rtol=1e-4, atol=wrong.sum())
    assert (one.confidence_HW is None) == (other.confidence_HW is None)
    if one.confidence_HW is not None:
        off = one.confidence_HW.astype(int) - other.confidence_HW
        assert abs(off).max() <= 1


def on_gpu(bundle) -> Segmenter:
    """A segmenter that takes the way of a GPU."""
    made = Segmenter(*files_of(bundle), "cpu")
    made.queues = Straight()
    made._gpu = made._on_gpu(made.queues)
    return made


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    return Segmenter(*files_of(tiny_bundle), "cpu")


@pytest.mark.parametrize("nodata", [False, True])
@pytest.mark.parametrize("confidence", [False, True])
def test_a_batch_of_any_sizes_kinds_and_holes_is_answered_as_one_by_one(
    plain, tiny_bundle, nodata, confidence
):
    chosen = pictures(nodata=nodata)
    expected = answers(plain, chosen, 10**9, confidence)

    found = answers(on_gpu(tiny_bundle), chosen, 10**9, confidence)

    assert found.keys() == expected.keys()
    for image_id, rows in found.items():
        assert_close(rows, expected[image_id])


def test_pictures_of_one_size_are_one_piece_of_work(tiny_bundle):
    segmenter = on_gpu(tiny_bundle)

    answers(segmenter, [picture(64, 64, seed) for seed in range(5)], 10**9)

    assert segmenter.queues.worked == 1


def test_the_seconds_of_the_device_are_those_of_its_own_clock(tiny_bundle):
    segmenter, passes = on_gpu(tiny_bundle), []
    batches = pack(cut([picture(64, 64, s) for s in range(3)], GRID), 10**9, 10**9, 4)

    list(segmenter.predict(batches, confidence=False, saw=passes.append))

    assert [one.device_s for one in passes] == [0.25]


@pytest.mark.parametrize("holes", [False, True])
def test_tiled_pictures_are_blended_on_the_host_and_finished_there(plain, tiny_bundle, holes):
    nodata = np.random.default_rng(0).random((300, 430)) < 0.2 if holes else None
    grid = grid_of(plain.found(10**6), 256, 32)
    one = picture(300, 430, 3, nodata=nodata, grid=grid)
    assert one.tiled

    def mask(segmenter):
        batches = pack(cut([one], grid), 10**9, 10**9, grid.align)
        said = segmenter.predict(batches, confidence=True)

        def finish(*about):
            return segmenter.finish(*about, confidence=True)

        return [strip.rows for strip in stitch(said, grid, finish)]

    for there, here in zip(mask(on_gpu(tiny_bundle)), mask(plain), strict=True):
        assert_close(there, here)


def test_classes_with_large_ids_come_back_as_their_ids(tmp_path):
    bundle = tiny_bundle(tmp_path, ids=(300, 7))
    chosen = pictures(nodata=True)
    expected = answers(Segmenter(*files_of(bundle), "cpu"), chosen, 10**9)

    for image_id, rows in answers(on_gpu(bundle), chosen, 10**9).items():
        assert rows.labels_HW.dtype == np.uint16
        assert_close(rows, expected[image_id])


def test_a_classifier_answers_as_one_by_one(tiny_classifier):
    plain = Segmenter(*files_of(tiny_classifier), "cpu")
    batches = list(pack(cut([picture(64, 64, s) for s in range(4)], GRID), 10**9, 10**9, 8))

    there = [a.probabilities_K for a in on_gpu(tiny_classifier).predict(batches, confidence=False)]

    here = [a.probabilities_K for a in plain.predict(batches, confidence=False)]
    np.testing.assert_allclose(there, here, atol=1e-3)  # its head is stretched


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize(("channels", "stored"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_a_batch_is_normalised_on_the_device_as_it_would_be_here(tmp_path, kind, channels, stored):
    from pipeline.feeding import factors, normalised, on_host, staged

    if kind == np.uint16 and stored == 3:
        pytest.skip("colours of 16 bits are read as 8")
    bundle = Segmenter(
        *files_of(tiny_bundle(tmp_path, channels=channels, limits=(300.0, 40_000.0))), "cpu"
    ).bundle
    sizes = [(40, 64), (64, 50)]
    tiles = list(cut([picture(*size, 1, stored, kind) for size in sizes], GRID))

    there = normalised(
        staged(tiles, bundle.input, 64, 64, pinned=False),
        *(torch.from_numpy(f) for f in factors(bundle.input, tiles[0].values_HWC.dtype)),
        torch.tensor(sizes),
        torch.float32,
    )

    torch.testing.assert_close(there, on_host(tiles, bundle.input, torch.float32, 64, 64))


def test_bfloat16_goes_the_same_way(tiny_bundle):
    half = Inference(precision="bf16")
    plain = Segmenter(*files_of(tiny_bundle), "cpu", inference=half)
    there = Segmenter(*files_of(tiny_bundle), "cpu", inference=half)
    there._gpu = there._on_gpu(Straight())

    (expected,) = answers(plain, [picture(64, 64, 1)], 1).values()
    (found,) = answers(there, [picture(64, 64, 1)], 1).values()

    assert_close(found, expected)


def test_a_tile_that_does_not_fit_is_tried_again_once_all_memory_is_given_back(tiny_bundle):
    segmenter = on_gpu(tiny_bundle)
    answer = segmenter._gpu.answers

    def crowded(tiles, *about):
        if len(tiles) > 1 or segmenter.queues.given_back < 2:
            raise RuntimeError("CUDA error: out of memory")
        return answer(tiles, *about)

    segmenter._gpu.answers = crowded

    found = answers(segmenter, [picture(64, 64, seed) for seed in range(2)], 10**9)

    assert len(found) == 2
    assert all(rows is not None for rows in found.values())
