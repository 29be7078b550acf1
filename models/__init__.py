"""Models that score every pixel of a picture, and the bundles they travel in.

Every .py file here is an architecture, named like the file. It offers a frozen `Config` (JSON both
ways, see parts/configs.py) and `build(config)`, a `Segmenter` (parts/segmenter.py). Adding a file
adds a model. What several share lies in parts/; how they are trained, in training/.

torch is imported by the first call that needs it, not by importing this package.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from models.parts.bundle import Bundle, ClassInfo, InputInfo, TileInfo
from models.parts.configs import Json, did_you_mean, from_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from models.parts.segmenter import Segmenter

__all__ = [
    "Bundle",
    "ClassInfo",
    "InputInfo",
    "Json",
    "TileInfo",
    "build",
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
        name: one of `names()`.
        **config: fields of the architecture's `Config`.

    Raises:
        ValueError: no such architecture, no such option, or a value it cannot have.
    """
    return _built(name, config)


def save_bundle(folder: Path, model: Segmenter, bundle: Bundle) -> str:
    """Write `model.json` and `weights.safetensors`; see parts/saved.py."""
    from models.parts import saved  # torch: see above

    return saved.save_bundle(folder, model, bundle)


def load_bundle(folder: Path) -> tuple[Segmenter, Bundle]:
    """The model of a bundle folder, ready to predict, and its card; see parts/saved.py."""
    from models.parts import saved  # torch: see above

    return saved.load_bundle(folder, _built)


def load_bundle_bytes(model_json: bytes, weights: bytes) -> tuple[Segmenter, Bundle]:
    """The same from the bytes of the two files."""
    from models.parts import saved  # torch: see above

    return saved.load_bundle_bytes(model_json, weights, _built)


def _built(name: str, config: Mapping[str, object]) -> Segmenter:
    if name not in names():
        raise ValueError(f"there is no architecture {name!r}{did_you_mean(name, names())}")
    module = import_module(f"{__name__}.{name}")
    return module.build(from_json(module.Config, config, where=f"architecture {name!r}"))
