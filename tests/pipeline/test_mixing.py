"""Batches that several threads share: every tile is answered once, to whom it belongs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.batch import Batch
from pipeline.mixing import Mixer
from pipeline.records import Pixels, PlannedImage
from pipeline.tile import Picture, Tile, TileAnswer

BUDGET = 4 * 64 * 64
WINDOW = 2**30


def tile(fragment: int, number: int, side: int) -> Tile:
    plan = PlannedImage(number, f"{fragment}/{number}", "", None, None, 0, "", "files", fragment)
    pixels = Pixels(np.zeros((side, side, 3), np.uint8), None)
    picture = Picture(plan, pixels, 0, "", large=False, rows=(0,), columns=(0,))
    return Tile(picture, 0, 0, side, side)


class Model:
    """Answers with nothing; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batches):
        self.batches += batches
        return [TileAnswer(each) for batch in batches for each in batch.tiles]


def fragment_of(number: int, sides: list[int]) -> list[Tile]:
    return [tile(number, i, side) for i, side in enumerate(sides)]


def together(mixer: Mixer, model: Model, fragments: list[list[Tile]]) -> list[list[TileAnswer]]:
    with ThreadPoolExecutor(len(fragments)) as pool:
        return list(pool.map(lambda tiles: list(mixer.answers(tiles, model)), fragments))


@pytest.mark.parametrize("seed", range(6))
def test_every_tile_is_answered_once_to_its_own_fragment_and_in_order(seed):
    draws = np.random.default_rng(seed)
    fragments = [
        fragment_of(n, list(draws.choice([32, 60, 64, 96], size=draws.integers(0, 60))))
        for n in range(5)
    ]

    answered = together(Mixer(BUDGET, WINDOW, 4), Model(), fragments)

    for tiles, answers in zip(fragments, answered, strict=True):
        assert {id(a.tile) for a in answers} == {id(t) for t in tiles}
        assert len(answers) == len(tiles)
        for side in {t.height for t in tiles}:
            of_side = [a.tile.picture.plan.image_id for a in answers if a.tile.height == side]
            assert of_side == sorted(of_side)


def test_a_batch_holds_one_padded_shape_and_no_more_than_the_budget():
    model = Model()
    together(Mixer(BUDGET, WINDOW, 4), model, [fragment_of(n, [60, 64] * 7) for n in range(3)])

    for batch in model.batches:
        assert batch.pixels <= BUDGET
        assert (batch.height, batch.width) == (64, 64)


def test_fragments_fill_each_others_batches():
    mixer, model = Mixer(BUDGET, WINDOW, 4), Model()
    both = threading.Barrier(2)

    def slowly(tiles):
        both.wait()  # neither is over before the other has begun
        yield from tiles

    fragments = [fragment_of(n, [64, 64]) for n in range(2)]
    together(mixer, model, [slowly(tiles) for tiles in fragments])

    assert [len(batch.tiles) for batch in model.batches] == [4]


def test_a_fragment_alone_waits_for_nobody():
    model = Model()
    answers = list(Mixer(BUDGET, WINDOW, 4).answers(fragment_of(0, [64, 32, 64]), model))

    assert len(answers) == 3
    assert len(model.batches) == 2


def test_what_waits_is_bounded_by_the_window():
    model = Model()
    mixer = Mixer(10**9, 3 * 64 * 64 * 3, 4)
    list(mixer.answers(fragment_of(0, [64] * 10), model))

    assert max(len(batch.tiles) for batch in model.batches) <= 4


def test_a_batch_that_fails_fails_everybody_in_it_and_nobody_waits_for_ever():
    mixer, both = Mixer(BUDGET, WINDOW, 4), threading.Barrier(2)

    def broken(batches):
        raise RuntimeError("no")

    def slowly(tiles):
        both.wait()
        yield from tiles

    def fails(tiles) -> bool:
        with pytest.raises(RuntimeError):
            list(mixer.answers(slowly(tiles), broken))
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(fails, [fragment_of(n, [64, 64]) for n in range(2)]))


def test_a_fragment_given_up_leaves_nothing_behind():
    mixer, model = Mixer(BUDGET, WINDOW, 4), Model()

    def stops():
        yield from fragment_of(0, [64, 64])
        raise KeyError("given up")

    with pytest.raises(KeyError):
        list(mixer.answers(stops(), model))
    list(mixer.answers(fragment_of(1, [64]), model))

    assert [len(batch.tiles) for batch in model.batches] == [1]
