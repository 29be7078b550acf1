"""Model configs as JSON and back, strictly: a typo must not train another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the configs of all architectures share; every further field has a default."""

    channels: int = 3
    """Bands of the picture: 1 (gray) or 3 (RGB)."""
    classes: int = 2
    """Scores per pixel."""

    def to_json(self) -> dict[str, Json]:
        """The config in types that JSON knows."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


Config = TypeVar("Config", bound=ModelConfig)


def from_json(cls: type[Config], values: Mapping[str, object], *, where: str) -> Config:
    """A config of this class.

    Args:
        cls: the architecture's config.
        values: some of its fields; lists stand for tuples.
        where: what to name in an error.

    Raises:
        ValueError: a key it does not have, or a value of another type than the default's.
    """
    defaults = {field.name: field.default for field in fields(cls)}
    checked = {}
    for key, value in values.items():
        if key not in defaults:
            raise ValueError(f"{where} has no option {key!r}{did_you_mean(key, defaults)}")
        checked[key] = _as_default(value, defaults[key], f"{where}: {key}")
    return cls(**checked)


def _as_default(value: object, default: object, where: str) -> object:
    """The value, if it is of the default's type; JSON knows no tuples, and writes 1.0 as 1."""
    if isinstance(default, tuple):
        items = tuple(value) if isinstance(value, list | tuple) else ()
        fits = bool(items) and {type(item) for item in items} == {type(default[0])}
        found: object = items
    else:
        found = float(value) if type(value) is int and type(default) is float else value
        fits = type(found) is type(default)
    if not fits:
        kind = type(default).__name__
        raise ValueError(f"{where} must be {kind} as in {default!r}, it is {value!r}")
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one and the list."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    question = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{question} known: {', '.join(known)}"
