"""An architecture that lies in a module of somebody else's, named by whoever asks for it.

Importing a module runs it. So a name comes from the caller (an argument, the command line), never
from a file alone: a card that names a module is loaded only if the caller names the same one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from models.parts.configs import ModelConfig

if TYPE_CHECKING:
    from types import ModuleType

    from models.parts.segmenter import Segmenter

OURS = ("models", "pipeline", "jobs")


def check(architecture: str, named: str | None) -> None:
    """Refuse a card's architecture if the caller named another, or did not name a module.

    Raises:
        ValueError: saying what to name.
    """
    if named is not None and named != architecture:
        raise ValueError(
            f"the card names architecture {architecture!r}, the caller {named!r}; "
            "both must be the same: correct one of them"
        )
    if named is None and "." in architecture:
        raise ValueError(
            f"the card names architecture {architecture!r}, a module outside of Maskfleet whose "
            f"code would run; if you trust it, say so: --architecture {architecture} on the "
            f"command line, load_bundle(..., architecture={architecture!r}) in Python"
        )


def module_of(name: str) -> Any:  # noqa: ANN401 - a module with Config and build
    """The module of a dotted name, which offers `Config` and `build` as a file of models/ does.

    Raises:
        ValueError: there is none, or it does not.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is no name of a module; write package.module")
    if name.split(".")[0] in OURS:
        raise ValueError(
            f"there is no architecture {name!r}: a dotted name is a module outside of Maskfleet, "
            "ours are called by their file alone"
        )
    module = _imported(name)
    config, build = getattr(module, "Config", None), getattr(module, "build", None)
    fits = isinstance(config, type) and issubclass(config, ModelConfig)
    if not fits:
        raise ValueError(
            f"module {name} offers no Config; define one that inherits "
            "models.parts.configs.ModelConfig, a frozen dataclass"
        )
    if build is None:
        raise ValueError(f"module {name} offers no build(config); define one that returns a model")
    return module


def checked(model: object, name: str) -> Segmenter:
    """The model that such a module has built.

    Raises:
        ValueError: it is something else.
    """
    from models.parts.network import Network  # torch: not for a refusal

    fits = isinstance(model, Network)
    if not fits:
        raise ValueError(
            f"build of module {name} returned {type(model).__name__}; it must return a "
            "models.parts.segmenter.Segmenter or a models.parts.classifier.Classifier"
        )
    return cast("Segmenter", model)


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"module {name} needs {error.name}, which is not installed") from error
        raise ValueError(
            f"there is no module {name} ({error}); install its package, or put the folder that "
            "holds it on PYTHONPATH, on every machine that segments"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"module {name} cannot be imported: {error}") from error
