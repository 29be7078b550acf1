"""A training between two steps, as values and as bytes: safetensors and JSON, never a pickle.

The JSON holds the hash of the tensors and one of itself: what was cut short or altered is refused
before a weight is changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import torch as tensors
from torch import Tensor

if TYPE_CHECKING:
    from models.parts.configs import Json

FORMAT_VERSION = 1
Weights = Mapping[str, Tensor]
PARTS = ("model", "mean", "best", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything needed to go on, by value."""

    recipe: Mapping[str, Json]
    """That it was made with; another one cannot go on from here."""
    epoch: int
    """Steps in an epoch; what the learning rate follows."""
    done: int
    """Steps so far."""
    best_figure: float | None
    """The best that was reported; None: nothing was."""
    reports_since: int
    """Reports since then."""
    model: Weights
    """All weights and buffers."""
    mean: Weights
    """Their running mean, if there is one."""
    best: Weights
    """Those of the best report, where the recipe has patience."""
    optimizer: Weights
    """What it remembers, as PARAMETER/WHAT."""

    def refuse_other(self, recipe: Mapping[str, Json]) -> None:
        """Raise ValueError, naming what differs, for a recipe it was not made with."""
        mine, other = _flat(self.recipe), _flat(recipe)
        for key in sorted(mine.keys() | other.keys()):
            if mine.get(key) != other.get(key):
                raise ValueError(
                    f"the state was made with {key} {mine.get(key)}, the recipe says "
                    f"{other.get(key)}; go on with the old recipe, or start anew with this one"
                )


def to_files(state: State) -> tuple[bytes, bytes]:
    """The tensors as safetensors, the rest as JSON."""
    weights = tensors.save(
        {
            f"{part}/{name}": value.cpu().contiguous()
            for part in PARTS
            for name, value in getattr(state, part).items()
        }
    )
    facts = {
        "format_version": FORMAT_VERSION,
        "recipe": state.recipe,
        "epoch": state.epoch,
        "done": state.done,
        "best_figure": state.best_figure,
        "reports_since": state.reports_since,
        "tensors_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return weights, _canonical({**facts, "sha256": _hash_of(facts)})


def from_files(weights: bytes, facts: bytes) -> State:
    """The state of such bytes, on the CPU.

    Raises:
        ValueError: they were cut short, altered, do not belong together or to this version.
    """
    try:
        said = json.loads(facts)
    except ValueError as problem:  # not UTF-8, not JSON
        raise ValueError(f"the state is damaged: {problem}; take an earlier one") from problem
    if not isinstance(said, dict) or said.pop("sha256", None) != _hash_of(said):
        raise ValueError("the state is damaged: its hash is wrong; take an earlier one")
    if said["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"the state has format version {said['format_version']}, this program reads "
            f"{FORMAT_VERSION}; go on with the version that wrote it"
        )
    if hashlib.sha256(weights).hexdigest() != said["tensors_sha256"]:
        raise ValueError("the tensors of the state are damaged or another's; take an earlier one")
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, value in tensors.load(weights).items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    return State(
        recipe=said["recipe"],
        epoch=said["epoch"],
        done=said["done"],
        best_figure=said["best_figure"],
        reports_since=said["reports_since"],
        **parts,
    )


def _flat(values: Mapping[str, Json], above: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}.")
        else:
            flat[above + key] = value
    return flat


def _canonical(values: Mapping[str, Json]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash_of(values: Mapping[str, Json]) -> str:
    return hashlib.sha256(_canonical(values)).hexdigest()
