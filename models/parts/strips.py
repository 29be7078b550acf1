"""How a map is cut into strips of rows."""

from itertools import pairwise

import torch
from torch import Tensor


def pays(x: Tensor) -> bool:
    """Whether strips, and C, are of use: on a CPU, to infer, where torch compiles nothing."""
    elsewhere = x.device.type != "cpu" or torch.compiler.is_compiling()
    return not elsewhere and not torch.is_grad_enabled()


def spans(length: int, each: int) -> list[tuple[int, int]]:
    """Where strips begin and end: all of one size, the last one takes up to twice as much.

    Alike from picture to picture, for oneDNN makes code for every shape that it does not remember
    (a millisecond: 2026-11-29). And no small rest, for torch 2.13 leaves oneDNN where little is
    left (under 20,480 values of one picture).
    """
    each = max(1, each)
    starts = [i * each for i in range(max(1, length // each))]
    return list(pairwise([*starts, length])) if length else []
