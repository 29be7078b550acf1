"""The same masks and classes on a GPU as on a CPU, but for what lies on the fence."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batch import pack
from pipeline.create import read_bundle
from pipeline.infer import Segmenter
from pipeline.records import Pixels, PlannedImage
from pipeline.tile import Picture, Tile
from tests.bundles import files_of
from tests.pictures import blobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DISAGREEMENT = 1e-3  # share of pixels whose class may differ: sums are ordered differently there


PROBABLY = 1e-2  # how far a probability may be off: the head of the untrained net is stretched


def tiles_of(sizes: list[tuple[int, int]]) -> list[Tile]:
    tiles = []
    for number, (height, width) in enumerate(sizes):
        plan = PlannedImage(number, str(number), "", None, None, 0, "", "files", 0)
        pixels = Pixels(blobs(height, width, number), None)
        tiles.append(
            Tile(
                Picture(plan, pixels, 0, "", large=False, rows=(0,), columns=(0,)),
                0,
                0,
                height,
                width,
            )
        )
    return tiles


def labels(device: str, sizes: list[tuple[int, int]], budget: int) -> list[np.ndarray]:
    segmenter = Segmenter(*read_bundle("demo"), device)
    answers = segmenter.predict(
        pack(tiles_of(sizes), budget, 2**40, segmenter.model.stride), confidence=False
    )
    found = {answer.tile.picture.plan.image_id: answer.rows.labels_HW for answer in answers}
    return [found[number] for number in range(len(sizes))]


SIZES = [(64, 64), (97, 130), (256, 256), (250, 200), (1, 1), (5, 300)]


def disagreement(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    differing = sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))
    return differing / sum(a.size for a in one)


def test_a_gpu_gives_the_masks_of_the_cpu():
    assert disagreement(labels("cpu", SIZES, 2**20), labels("cuda", SIZES, 2**20)) <= DISAGREEMENT


def test_on_a_gpu_batch_mates_hardly_matter():
    assert disagreement(labels("cuda", SIZES, 1), labels("cuda", SIZES, 2**22)) <= DISAGREEMENT


def probabilities(bundle: Path, device: str, budget: int) -> np.ndarray:
    segmenter = Segmenter(*files_of(bundle), device)
    batches = pack(tiles_of(SIZES), budget, 2**40, segmenter.model.multiple)
    answers = segmenter.predict(batches, confidence=False)
    found = {answer.tile.picture.plan.image_id: answer.probabilities_K for answer in answers}
    return np.stack([found[number] for number in range(len(SIZES))])


def test_a_gpu_gives_the_classes_of_the_cpu_whatever_the_batch(tiny_classifier):
    on_cpu = probabilities(tiny_classifier, "cpu", 2**20)

    for budget in (1, 2**22):
        on_gpu = probabilities(tiny_classifier, "cuda", budget)
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=PROBABLY)
