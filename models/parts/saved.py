"""Bundles on disk and in bytes. Nothing here unpickles: weights are safetensors, or refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import safetensors
import torch
from safetensors import torch as tensors

from models.parts.bundle import CARD, RUNS_CODE, WEIGHTS, Bundle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.parts.segmenter import Segmenter


class Build(Protocol):
    """Makes the model of an architecture and a config; handed in, as it knows the folder."""

    def __call__(self, name: str, config: Mapping[str, object]) -> Segmenter: ...  # noqa: D102


def save_bundle(folder: Path, model: Segmenter, bundle: Bundle) -> str:
    """Write the two files; equal models and cards give equal bytes.

    Args:
        folder: made if missing; a bundle that lies there is replaced.
        model: its weights are written from whatever device they are on.
        bundle: the card; its weights_sha256 is filled in here.

    Returns:
        The hash of the bundle.

    Raises:
        ValueError: the card is not about this model.
    """
    card, weights = as_bytes(model, bundle)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CARD).write_bytes(card)
    return hashlib.sha256(card).hexdigest()


def as_bytes(model: Segmenter, bundle: Bundle) -> tuple[bytes, bytes]:
    """What `save_bundle` writes: model.json and weights.safetensors.

    Raises:
        ValueError: the card is not about this model.
    """
    _refuse_strangers(model, bundle)
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    weights = tensors.save(state)
    card = replace(bundle, weights_sha256=hashlib.sha256(weights).hexdigest())
    return card.to_json(), weights


def load_bundle(folder: Path, build: Build) -> tuple[Segmenter, Bundle]:
    """The model of a folder, in eval mode, and its card.

    Raises:
        ValueError: the folder is no bundle, or one that cannot be trusted.
        FileNotFoundError: one of the two files is missing.
    """
    folder = Path(folder)
    candidates = [folder] if folder.is_file() else sorted(folder.iterdir())
    for path in candidates:
        if path.suffix.lower() in RUNS_CODE:
            raise ValueError(
                f"{path} is a pickle: opening it would run what it holds; "
                f"save the weights as {WEIGHTS} and remove it"
            )
    return load_bundle_bytes((folder / CARD).read_bytes(), (folder / WEIGHTS).read_bytes(), build)


def load_bundle_bytes(model_json: bytes, weights: bytes, build: Build) -> tuple[Segmenter, Bundle]:
    """The model of the two files' bytes, in eval mode, and its card.

    Raises:
        ValueError: they do not belong together, or not to this version.
    """
    bundle = Bundle.from_json(model_json)
    found = hashlib.sha256(weights).hexdigest()
    if found != bundle.weights_sha256:
        raise ValueError(
            f"{WEIGHTS} has sha256 {found}, {CARD} says {bundle.weights_sha256 or 'nothing'}; "
            "the files are damaged or not of one bundle: fetch both again"
        )
    with torch.random.fork_rng(devices=[]):  # the random start is thrown away; leave no trace
        model = build(bundle.architecture, bundle.config)
    _refuse_strangers(model, bundle)
    try:
        model.load_state_dict(tensors.load(weights), strict=True)
    except (RuntimeError, safetensors.SafetensorError) as problem:
        raise ValueError(
            f"{WEIGHTS} does not fit architecture {bundle.architecture!r}: {problem}"
        ) from problem
    return model.eval(), bundle


def _refuse_strangers(model: Segmenter, bundle: Bundle) -> None:
    said = {
        "task": bundle.task,
        "config": bundle.config,
        "classes": len(bundle.classes),
        "input.channels": bundle.input.channels,
        "stride": bundle.stride,
        "receptive_field": bundle.receptive_field,
    }
    true = {
        "task": model.task,
        "config": model.config.to_json(),
        "classes": model.classes,
        "input.channels": model.channels,
        "stride": model.stride,
        "receptive_field": model.receptive_field,
    }
    for key, value in true.items():
        if said[key] != value:
            raise ValueError(f"{CARD}: {key} is {said[key]!r}, the model has {value!r}")
