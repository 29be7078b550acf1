"""One of two processes that share a training; what tests of a training alone compare it with.

`python -m tests.models.two_workers FOLDER RANK` leaves RANK.json in the folder.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.training.fit import Diverged, Fit
from models.training.rates import Rate
from models.training.recipes import Recipe, Terms

VOID = 255
STEPS = 12
EVERY_TERM = Terms(focal=0.5, dice=0.5, lovasz=0.5, class_weights=(0.5, 2.0))


def net(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(8, 2, 1),
    )


def batches(count, seed=0, pictures=2):
    """Bright pixels are class 1; one pixel in ten is void."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x_BCHW = torch.randn(pictures, 1, 8, 8, generator=generator)
        labels_BHW = (x_BCHW[:, 0] > 0.3).long()
        void_BHW = torch.rand(labels_BHW.shape, generator=generator) < 0.1
        yield x_BCHW, labels_BHW.masked_fill(void_BHW, VOID)


def short(steps, **knobs):
    knobs = {"rate": Rate(warmup=2), "average": 0.9, **knobs}
    return Recipe(length=steps, **knobs)


def weights_of(model):
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


def uneven(count):
    """Batches of 8 whose labels are mostly void in the first picture, and all void in the last."""
    for x_BCHW, labels_BHW in batches(count, pictures=8):
        labels_BHW[0, 1:], labels_BHW[-1] = VOID, VOID
        yield x_BCHW, labels_BHW


def as_worker(folder, rank):
    """Train three times with the other: soundly, with an early end, and poisoned."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )

    def total(value):
        torch.distributed.all_reduce(value)
        return value

    def started():
        recipe = short(
            STEPS, batch=8, accumulate=2, loss=EVERY_TERM, frozen_statistics=True, keep_every=1
        )
        return Fit(DistributedDataParallel(net()), recipe, rank=rank, total=total)

    mine = [
        (x_BCHW[rank::2][part], labels_BHW[rank::2][part])
        for x_BCHW, labels_BHW in uneven(STEPS)
        for part in (slice(0, 2), slice(2, 4))
    ]
    sound = started()
    losses = [moment.loss for moment in sound.steps(mine)]
    early = len(list(started().steps(mine[: 5 + 7 * rank])))
    poisoned = [*mine]
    if rank == 1:
        poisoned[6] = torch.full((2, 1, 8, 8), torch.nan), poisoned[6][1]
    ill = started()
    try:
        list(ill.steps(poisoned))
    except Diverged as problem:
        said = str(problem)
    found = {
        "losses": losses,
        "weights": weights_of(sound.settle()).tolist(),
        "early": early,
        "said": said,
        "back": ill.done,
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    as_worker(Path(sys.argv[1]), int(sys.argv[2]))
    # Not through the interpreter's end: gloo's threads outlive their group, and one that lets go of
    # a tensor meanwhile aborts the process (pytorch/pytorch#190489).
    os._exit(0)
