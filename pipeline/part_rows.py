"""Parts of a training's steps as rows of a Ray Data stream: made by tasks, read by workers.

Apart from train_on_ray.py because that imports torch: tasks run in as many processes as there is
room for, and to decode and colour pictures none of them needs three seconds and 200 MB of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from pipeline.cluster import with_settings
from pipeline.trainset import Part, TrainSet

if TYPE_CHECKING:
    from pipeline.records import Array


@dataclass(frozen=True)
class Steps:
    """The steps of a training, each in parts: what a task must know, on whatever machine."""

    train: TrainSet
    parts: int
    """That a step comes in, over all workers."""


def made(
    row: Mapping[str, Array],
    reference: Any,  # noqa: ANN401 - an ObjectRef
    settings: str,
) -> Iterator[dict[str, Array]]:
    """All parts of a stretch of steps, a row each.

    Args:
        row: its `begin` and `end`, one value each.
        reference: to `Steps`.
        settings: where the store is (`cluster.forwarded`).
    """
    with_settings(settings)
    of = _held(reference)
    stretch = range(int(row["begin"][0]), int(row["end"][0]))
    for step, slot in product(stretch, range(of.parts)):
        yield _row(of.train.part(step, slot, of.parts))


@functools.lru_cache(maxsize=2)
def _held(reference: Any) -> Steps:  # noqa: ANN401 - an ObjectRef
    """Unpacked once in every process."""
    return ray.get(reference)


def _row(part: Part) -> dict[str, Array]:
    return {
        "step": np.array([part.step]),
        "pixels": part.pixels_BhwC[None],
        "labels": part.labels[None],
        "rejected": np.array([json.dumps(part.rejected)]),
    }


def part_of(row: Mapping[str, Array]) -> Part:
    """Undo `_row`."""
    rejected = tuple(map(tuple, json.loads(str(row["rejected"][0]))))
    return Part(int(row["step"][0]), row["pixels"][0], row["labels"][0], rejected)
