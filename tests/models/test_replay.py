"""Work that is recorded for shapes that come often gives the same answers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import models
from models import latent_attention
from models.parts import replay
from models.parts.replay import Replayed


class Counting:
    """A model's grid that knows how often Python ran it."""

    def __init__(self, grid):
        self.grid, self.calls = grid, 0

    def __call__(self, x_BCHW, sizes_B2):
        self.calls += 1
        return self.grid(x_BCHW, sizes_B2)


@pytest.fixture(params=[{}, {"variant": "plus", "size": "xs"}], ids=["seed", "plus"])
def model(request):
    return models.build("latent_attention", **request.param).eval().folded()


@pytest.mark.parametrize("strip", [1, latent_attention.STEM_STRIP])
@torch.inference_mode()
def test_the_answers_are_the_same_bit_for_bit_before_and_after(model, strip, monkeypatch):
    monkeypatch.setattr(latent_attention, "STEM_STRIP", strip)
    grid = Counting(model.grid)
    replayed = Replayed(grid)
    pictures = [torch.randn(1, 3, 64, 96) for _ in range(replay.AFTER + 6)]

    for x_BCHW in pictures:
        assert torch.equal(replayed(x_BCHW, None), model.grid(x_BCHW, None))

    assert grid.calls == replay.AFTER + 1  # recorded once, replayed from then on


@torch.inference_mode()
def test_every_shape_has_a_recording_of_its_own_and_only_so_many_have_one(model, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 2)
    grid = Counting(model.grid)
    replayed = Replayed(grid)

    for side in (32, 48, 64):
        for _ in range(replay.AFTER + 2):
            x_BCHW = torch.randn(1, 3, side, 32)
            assert torch.equal(replayed(x_BCHW, None), model.grid(x_BCHW, None))

    assert grid.calls == 2 * (replay.AFTER + 1) + replay.AFTER + 2


@torch.inference_mode()
def test_what_looks_at_values_is_found_out_and_not_replayed():
    turns = iter(range(10**6))
    grid = Counting(lambda x_BCHW, _: x_BCHW * next(turns))  # differs from call to call
    replayed = Replayed(grid)

    for _ in range(replay.AFTER + 5):
        replayed(torch.ones(1, 3, 8, 8), None)

    assert grid.calls == replay.AFTER + 1 + 5


def test_threads_may_share_it(model, monkeypatch):
    monkeypatch.setattr(replay, "AFTER", 12)  # recorded while others are at it
    replayed = Replayed(model.grid)
    pictures = [torch.randn(1, 3, 48, 48) for _ in range(40)]

    @torch.inference_mode()
    def same(x_BCHW):
        return torch.equal(replayed(x_BCHW, None), model.grid(x_BCHW, None))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, pictures))
