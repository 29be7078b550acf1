"""What may be captured as a CUDA graph asks for no value: played through where there are none.

Tensors of torch's device `meta` have shapes alone: whoever wants a value of one, or brings one of
the host's along, ends with an error, as in a capture.
"""

import pytest
import torch

import models
from pipeline import captured
from pipeline.captured import Captured
from pipeline.feeding import factors
from pipeline.finishing import Finisher
from pipeline.gpu import Gpu
from pipeline.tile import cut
from tests.pipeline.test_gpu import Straight
from tests.pipeline.test_infer import GRID, picture

NETS = {
    "seed": ("latent_attention", {}),
    "plus": ("latent_attention", {"variant": "plus", "size": "xs"}),
    "segformer": ("segformer", {}),
    "depict sa": ("depict", {}),
    "depict ca": ("depict", {"mode": "ca"}),
    "segnet": ("segnet", {}),
    "vit": ("vit_segmenter", {}),
    "vit classifier": ("vit_classifier", {}),
}


def net(name):
    architecture, config = NETS[name]
    return models.build(architecture, **config).eval().folded().to("meta")


@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_every_net_that_may_be_captured_asks_for_no_value(name):
    model = net(name)
    work = getattr(model, "scores" if model.task == "classify" else "grid")
    x_BCHW = torch.empty(2, model.channels, 128, 128, device="meta")
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)

    assert model.captures
    assert work(x_BCHW, None).is_meta
    assert work(x_BCHW, torch.empty(2, 2, dtype=torch.int64, device="meta")).is_meta


def test_this_would_find_one_that_does():
    with pytest.raises(RuntimeError, match="meta tensors"):
        float(torch.ones(3, device="meta").sum())


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("sizes", [[(64, 64), (64, 64)], [(64, 64), (60, 33)]])
@torch.inference_mode()
def test_from_stored_pixels_to_labels_a_batch_asks_for_no_value(sizes, holes, confidence):
    model, device = net("plus"), torch.device("meta")
    about = models.InputInfo(3, (0.5,) * 3, (0.2,) * 3, None)
    gpu = Gpu(model, about, Finisher([3, 7], device), torch.float32, Straight(), device)
    tiles = list(cut([picture(*size, 1) for size in sizes], GRID))
    wanted = gpu._wanted(tiles, (64, 64), confidence)
    gpu._factors["uint8"] = tuple(
        torch.from_numpy(each).to(device) for each in factors(about, tiles[0].values_HWC.dtype)
    )
    there = [
        torch.empty(2, 64, 64, 3, dtype=torch.uint8, device=device),
        torch.empty(4, 2, 2, dtype=torch.int64, device=device),
    ]
    there += [torch.empty(2, 64, 64, dtype=torch.bool, device=device)] if holes else []

    made = gpu._made(tiles, wanted, there)

    assert all(each.is_meta for each in made)
    assert [tuple(each.shape) for each in made[:3]] == [(2, 64, 64), (2, 2), (2, 2)]
    assert len(made) == (4 if confidence else 3)


class Recording(Captured):
    """Captures by remembering, for machines without graphs."""

    def __init__(self):
        super().__init__()
        self.taken = 0

    def _captured(self, given, work):
        self.taken += 1
        return work


def test_what_comes_often_is_captured_once_for_each_kind_and_shape(monkeypatch):
    monkeypatch.setattr(captured, "MOST", 3)
    ran, work = [], Recording()

    def double(given):
        ran.append(len(given[0]))
        return [2 * given[0]]

    for _ in range(captured.AFTER + 2):
        for kind in ("one", "other"):
            for length in (2, 3):
                (made,) = work(kind, [torch.ones(length, 4)], double)
                assert torch.equal(made, torch.full((length, 4), 2.0))

    assert work.taken == 3
    assert len(ran) == 4 * (captured.AFTER + 2)
