"""Models that score every pixel of a picture, and the bundles they travel in.

Every .py file here is an architecture, named like the file. It offers a frozen `Config` (JSON both
ways, see parts/configs.py) and `build(config)`, a `Segmenter` (parts/segmenter.py). Adding a file
adds a model. What several share lies in parts/; how they are trained, in training/; what was made
elsewhere (transformers, ONNX, a module of yours) and can be used all the same, in foreign/.

torch is imported by the first call that needs it, not by importing this package.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from models import foreign
from models.foreign import named
from models.parts.about import About
from models.parts.bundle import CARD, Bundle, ClassInfo, InputInfo, TileInfo
from models.parts.configs import Json, did_you_mean, from_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.parts.facts import Facts
    from models.parts.segmenter import Segmenter

__all__ = [
    "About",
    "Bundle",
    "ClassInfo",
    "InputInfo",
    "Json",
    "TileInfo",
    "about",
    "build",
    "facts",
    "load_bundle",
    "load_bundle_bytes",
    "names",
    "save_bundle",
]


def names() -> list[str]:
    """The architectures: the files of this folder."""
    return sorted(module.name for module in iter_modules(__path__) if not module.ispkg)


def build(name: str, **config: object) -> Segmenter:
    """A freshly initialised model.

    Args:
        name: one of `names()`; or the dotted name of a module outside, whose code is run.
        **config: fields of the architecture's `Config`.

    Raises:
        ValueError: no such architecture, no such option, or a value it cannot have.
    """
    return _built(name, config)


def about(name: str) -> About:
    """An architecture's word on itself: paper, variants, what it is good for, licences."""
    return import_module(f"{__name__}.{name}").ABOUT


def facts(name: str, **config: object) -> Facts:
    """Parameters, operations and sizes of a model, counted without building it in memory."""
    from models.parts import facts  # torch: see above

    return facts.counted(lambda: _built(name, config))


def save_bundle(folder: Path, model: Segmenter, bundle: Bundle) -> str:
    """Write `model.json` and `weights.safetensors`; see parts/saved.py."""
    from models.parts import saved  # torch: see above

    return saved.save_bundle(folder, model, bundle)


def load_bundle(folder: Path | str, architecture: str | None = None) -> tuple[Segmenter, Bundle]:
    """The model of a bundle folder, ready to predict, and its card; see parts/saved.py.

    A transformers checkpoint and an ONNX file are loaded too; see foreign/.

    Args:
        folder: the folder, or an .onnx file.
        architecture: must be given, and the card's, where the card names a module outside.

    Raises:
        ValueError: there is no model there, or one that cannot be trusted or used.
    """
    from models.parts import saved  # torch: see above

    folder = Path(folder)
    if (folder / CARD).is_file():
        return saved.load_bundle(folder, partial(_named, architecture))
    return load_bundle_bytes(*foreign.bundle_at(folder), architecture)


def load_bundle_bytes(
    model_json: bytes, weights: bytes, architecture: str | None = None
) -> tuple[Segmenter, Bundle]:
    """The same from the bytes of a bundle's two files."""
    from models.parts import saved  # torch: see above

    return saved.load_bundle_bytes(model_json, weights, partial(_named, architecture))


def _named(architecture: str | None, name: str, config: Mapping[str, object]) -> Segmenter:
    """The model of a card, if its architecture may be used."""
    named.check(name, architecture)
    return _built(name, config)


def _built(name: str, config: Mapping[str, object]) -> Segmenter:
    if "." in name:
        module = named.module_of(name)
    elif name in foreign.NAMES:
        module = import_module(f"{__name__}.foreign.{name}")
    elif name in names():
        module = import_module(f"{__name__}.{name}")
    else:
        raise ValueError(f"there is no architecture {name!r}{did_you_mean(name, names())}")
    model = module.build(from_json(module.Config, config, where=f"architecture {name!r}"))
    return named.checked(model, name) if "." in name else model
