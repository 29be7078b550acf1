"""The same masks on a GPU as on a CPU, but for pixels that lie on the fence."""

import numpy as np
import pytest
import torch

from pipeline.batch import pack
from pipeline.create import read_bundle
from pipeline.infer import Segmenter
from pipeline.records import Pixels, PlannedImage
from pipeline.tile import Picture, Tile
from tests.pictures import blobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DISAGREEMENT = 1e-3  # share of pixels whose class may differ: sums are ordered differently there


def labels(device: str, sizes: list[tuple[int, int]], budget: int) -> list[np.ndarray]:
    segmenter = Segmenter(*read_bundle("demo"), device)
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
    answers = segmenter.predict(pack(tiles, budget, 2**40, segmenter.stride), confidence=False)
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
