"""Every pass in C against the same by torch, for every set of instructions that this core knows.

    python -m benchmarks.passes

One thread, a picture of 480 x 352 pixels; milliseconds of processor time, the best of many turns
that the ways take one after the other.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.models import lively, turns
from benchmarks.record import record
from models.parts import kernels
from models.parts.bundle import InputInfo
from models.parts.conv3x3 import faster
from pipeline.feeding import on_host
from pipeline.finishing import Finisher
from pipeline.heap import keep_freed_memory
from pipeline.records import Pixels, PlannedImage
from pipeline.tile import Picture, Tile

HEIGHT, WIDTH, CLASSES = 352, 480, 11
Pass = tuple[str, Callable[[], object]]


def passes() -> Iterator[Pass]:
    """Each pass as the library that is chosen now does it: what it is called, and the call."""
    seed, plus = (lively("latent_attention", name).folded() for name in ("seed", "plus s"))
    x_BCHW = torch.randn(1, 3, HEIGHT, WIDTH).contiguous(memory_format=torch.channels_last)
    tokens_BTF = torch.randn(1, HEIGHT * WIDTH // 16, 64)
    prepared = seed.ask.prepared(torch.randn(1, 16, 64))
    fine_BCHW, tokens_BCHW = (
        torch.randn(1, channels, HEIGHT // 4, WIDTH // 4).contiguous(
            memory_format=torch.channels_last
        )
        for channels in (32, 64)
    )
    block = next(plus.encoder.stages[0].children())
    many = faster(nn.Conv2d(64, 64, 3, padding=1))
    scores_Khw = torch.randn(CLASSES, HEIGHT // 4, WIDTH // 4) * 4
    finisher = Finisher(list(range(CLASSES)), torch.device("cpu"))
    grid, size = tuple(scores_Khw.shape[1:]), (HEIGHT, WIDTH)
    about, tile = InputInfo(3, (0.5,) * 3, (0.25,) * 3), _tile()

    yield "normalise", lambda: on_host([tile], about, torch.float32, HEIGHT, WIDTH)
    yield "begin `seed`", lambda: seed.encoder(x_BCHW, None)
    yield "64 to 64 channels, 3 x 3", lambda: many(tokens_BCHW)
    yield "read", lambda: seed.read(tokens_BTF, None)
    yield "ask", lambda: seed.ask.by_output(tokens_BTF, *prepared)
    yield "a block of `plus s`", lambda: block(fine_BCHW)
    yield (
        "finish",
        lambda: finisher.finished(
            scores_Khw, 0, grid, size, (0, HEIGHT), WIDTH, None, confidence=False
        ),
    )
    yield "all of `seed`", lambda: seed.grid(x_BCHW, None)
    yield "all of `plus s`", lambda: plus.grid(x_BCHW, None)


def _tile() -> Tile:
    values = torch.randint(0, 256, (HEIGHT, WIDTH, 3), dtype=torch.uint8).numpy()
    plan = PlannedImage(0, "", "", None, None, 0, "", "", 0)
    picture = Picture(plan, Pixels(values, None), 0, "", large=False, rows=(0,), columns=(0,))
    return Tile(picture, 0, 0, HEIGHT, WIDTH)


def by(library: object, call: Callable[[], object]) -> object:
    """What a call gives while this library is the chosen one."""
    kernels.LIBRARY = library
    return call()


@torch.inference_mode()
def main() -> None:
    """Measure and record."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    if kernels.LIBRARY is None:
        raise SystemExit("nothing was compiled here: install a C compiler, and `pip install` again")
    ways = {"torch": None, **{f"{each.lanes} lanes": each for each in kernels.known()}}
    made: list[list[Pass]] = []
    for library in ways.values():
        kernels.LIBRARY = library
        torch.manual_seed(0)
        made.append([(name, partial(by, library, call)) for name, call in passes()])
    rows = []
    for same in zip(*made, strict=True):
        times = turns([call for _, call in same], time.thread_time)
        told = " | ".join(f"{1e3 * seconds:.2f}" for seconds in times)
        rows.append(f"| {same[0][0]} | {told} | {times[0] / min(times[1:]):.1f} |")
    head = [f"| ms | {' | '.join(ways)} | torch ÷ best |", f"|---|{'---|' * (len(ways) + 1)}"]
    record("passes in C", [*head, *rows])


if __name__ == "__main__":
    main()
