"""Models made elsewhere, as bundles: a `transformers` checkpoint, an ONNX file, a module of yours.

The first two become bundles of their own (`bundle_of`): what is run, and what a run folder keeps,
is always `model.json` and `weights.safetensors`. A module is named by whoever starts the run
(named.py). Everything that would run code when it is opened is refused.

What the two share, which sizes they read, is in guest.py. They are architectures like the files of
models/, though not among its `names()`: nobody trains them here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from models.parts.bundle import CARD, RUNS_CODE, WEIGHTS

NAMES = ("huggingface", "onnx")
FILES = frozenset({".onnx", *RUNS_CODE})
"""Endings of a `--model` that is one file, not a folder."""

Read = Callable[[str], bytes | None]
"""The bytes of a file by its name, None where there is none."""


def bundle_of(read: Read, names: Callable[[], Iterable[str]]) -> tuple[bytes, bytes]:
    """`model.json` and `weights.safetensors` of what lies in a place, made if it is no bundle yet.

    Equal files give equal bytes: a run belongs to one bundle.

    Args:
        read: reads a file there.
        names: the files there; asked only if there is neither a bundle nor a checkpoint.

    Raises:
        ValueError: there is no model, none that can be used, or one that would run code.
    """
    card = read(CARD)
    weights = None if card is None else read(WEIGHTS)
    if card is not None and weights is not None:
        return card, weights
    if card is None and (config := read("config.json")) is not None:
        from models.foreign import huggingface  # torch: not for those who bring a bundle

        return huggingface.bundle_of(config, read, names)
    found = sorted(names())
    graphs = [name for name in found if name.lower().endswith(".onnx")]
    if card is None and len(graphs) == 1 and (graph := read(graphs[0])) is not None:
        from models.foreign import onnx  # torch: see above

        return onnx.bundle_of(graph)
    raise ValueError(why_not(found))


def bundle_at(path: Path) -> tuple[bytes, bytes]:
    """The same for a folder or a file of this machine."""
    folder, only = (path.parent, path.name) if path.is_file() else (path, None)

    def read(name: str) -> bytes | None:
        there = only in (None, name) and (folder / name).is_file()
        return (folder / name).read_bytes() if there else None

    def names() -> list[str]:
        return [entry.name for entry in folder.iterdir()] if only is None else [only]

    return bundle_of(read, names)


def why_not(names: Iterable[str]) -> str:
    """Why these files are no model, and the way out."""
    what = (
        f"a bundle is a folder with {CARD} and {WEIGHTS}; a transformers checkpoint (config.json "
        "and model.safetensors) and an .onnx file are read too. "
        "Pickles, .pt2 and TorchScript are not loaded"
    )
    unsafe = [name for name in names if Path(name).suffix.lower() in RUNS_CODE]
    if unsafe:
        return (
            f"{unsafe[0]} is a pickle or a program: opening it would run what it holds; "
            "save the weights as safetensors (transformers: model.save_pretrained, torch: "
            f"safetensors.torch.save_model) or export to ONNX. There is no bundle there; {what}"
        )
    return f"no bundle there; {what}"
