"""Work that is captured on a GPU gives the answers it would give without."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import models
from pipeline import captured
from pipeline.captured import Captured
from pipeline.infer import Segmenter
from tests.bundles import files_of
from tests.gpu.test_device import disagreement, tiles_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NETS = {
    "seed": ("latent_attention", {}),
    "plus": ("latent_attention", {"variant": "plus", "size": "xs"}),
    "segformer": ("segformer", {}),
    "depict": ("depict", {}),
    "segnet": ("segnet", {}),
    "vit": ("vit_segmenter", {}),
}


@pytest.fixture(params=NETS)
def model(request):
    torch.manual_seed(0)
    name, config = NETS[request.param]
    net = models.build(name, **config).cuda().to(memory_format=torch.channels_last)
    return net.eval().folded()


@pytest.fixture
def seed_net():
    return models.build("latent_attention").cuda().eval().folded()


@pytest.fixture(autouse=True)
def one_stream():
    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
        yield


def batch(count=2, height=128, width=128):
    x_BCHW = torch.randn(count, 3, height, width, device="cuda")
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=float(1e-4 * other.abs().max()))


def test_every_net_that_says_so_is_captured_and_answers_as_before(model):
    work, grid = Captured(), model.grid
    assert model.captures

    for _ in range(captured.AFTER + 3):
        x_BCHW = batch()
        (found,) = work("even", [x_BCHW], lambda given: [grid(given[0], None)])
        close(found, grid(x_BCHW, None))

    assert len(work._graphs) == 1


def test_sizes_of_the_pictures_in_a_batch_may_change_from_call_to_call(model):
    work, grid = Captured(), model.grid

    for turn in range(captured.AFTER + 4):
        x_BCHW = batch()
        sides = [[32 + 32 * (turn % 3), 96], [64, 32 + 32 * (turn % 2)]]
        sizes_B2 = torch.tensor(sides, device="cuda")
        (found,) = work("uneven", [x_BCHW, sizes_B2], lambda given: [grid(*given)])
        for one, other, (h, w) in zip(found, grid(x_BCHW, sizes_B2), sides, strict=True):
            rows, columns = h // model.stride, w // model.stride
            close(one[:, :rows, :columns], other[:, :rows, :columns])

    assert len(work._graphs) == 1


def test_what_depends_on_more_than_it_is_given_is_found_out():
    turns, work = iter(range(1, 10**6)), Captured()

    for _ in range(captured.AFTER + 3):
        work("any", [batch()], lambda given: [given[0] * next(turns)])

    assert not work._graphs


def test_only_so_many_shapes_are_captured_and_all_are_right(seed_net, monkeypatch):
    monkeypatch.setattr(captured, "MOST", 2)
    work, grid = Captured(), seed_net.grid

    for side in (64, 96, 128, 64, 96, 128):
        for _ in range(captured.AFTER + 2):
            x_BCHW = batch(2, side, 64)
            (found,) = work("even", [x_BCHW], lambda given: [grid(given[0], None)])
            close(found, grid(x_BCHW, None))

    assert len(work._graphs) == 2


def test_a_segmenter_answers_the_same_before_and_after(tiny_bundle):
    segmenter = Segmenter(*files_of(tiny_bundle), "cuda")
    sizes = [(64, 64), (60, 64), (64, 50), (64, 64)]

    def masks():
        answers, _ = segmenter._run(tuple(tiles_of(sizes)), 64, 64, confidence=True)
        return [answer.rows.labels_HW for answer in answers]

    first = masks()
    for _ in range(captured.AFTER + 2):
        again = masks()

    assert len(segmenter._gpu._captured._graphs) == 1
    assert disagreement(first, again) <= 1e-3
    assert [mask.shape for mask in again] == sizes


def test_other_threads_may_use_the_device_while_one_captures(seed_net):
    running = True

    @torch.inference_mode()
    def busy():
        while running:
            with torch.cuda.stream(torch.cuda.Stream()):
                host = torch.empty(1000, 1000).pin_memory()
                there = host.to("cuda", non_blocking=True)
                np.asarray((there @ torch.ones(1000, 1000, device="cuda")).cpu())

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(busy) for _ in range(2)]
        works = [Captured() for _ in range(5)]
        try:
            for work in works:
                for _ in range(captured.AFTER + 1):
                    x_BCHW = batch()
                    (found,) = work("any", [x_BCHW], lambda given: [seed_net.grid(given[0], None)])
                    close(found, seed_net.grid(x_BCHW, None))
        finally:
            running = False
        for other in others:
            other.result()

    assert all(len(work._graphs) == 1 for work in works)
