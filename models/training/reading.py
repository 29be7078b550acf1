"""Strict configs of dataclasses within dataclasses: a typo must not train another model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from models.parts.configs import Json, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""To be the `__pydantic_config__` of every dataclass that is read here."""
T = TypeVar("T")


def to_json(config: object) -> dict[str, Json]:
    """A config in types that JSON knows: tuples become lists."""
    return json.loads(json.dumps(asdict(cast("Any", config))))


def from_json(cls: type[T], values: Mapping[str, object], *, where: str) -> T:
    """A config of this class.

    Args:
        cls: a dataclass whose fields all have defaults.
        values: some of its fields, nested like it; lists stand for tuples.
        where: what to name in an error.

    Raises:
        ValueError: naming every key it does not have and every value it cannot have.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as problem:
        sentences = "; ".join(_sentence(cls, each) for each in problem.errors())
        raise ValueError(f"{where}: {sentences}") from problem


def refuse_unknown(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError for a word that is none of these."""
    if value not in known:
        raise ValueError(f"{name} cannot be {value!r}{did_you_mean(value, known)}")


def refuse_below(least: float, config: object, *names: str, of: str = "") -> None:
    """Raise ValueError for a number of the config that is less, or none."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:
            raise ValueError(f"{of}{name} must be at least {least}, it is {value}")


def refuse_no_share(config: object, *names: str, of: str = "") -> None:
    """Raise ValueError for a number of the config that is not 0 to 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{of}{name} must be 0 to 1, it is {value}")


def _sentence(cls: type, problem: Any) -> str:  # noqa: ANN401 - pydantic's error dictionary
    path = [str(part) for part in problem["loc"]]
    *outer, last = path or [""]
    if problem["type"] == "unexpected_keyword_argument":
        known = [field.name for field in fields(_inner(cls, outer))]
        return f"there is no option {'.'.join((*outer, last))!r}{did_you_mean(last, known)}"
    if problem["type"] == "value_error":  # our own, from a __post_init__
        return problem["msg"].removeprefix("Value error, ")
    where = ".".join(part for part in path if "[" not in part)  # pydantic names members of unions
    return f"{where} {problem['msg'].removeprefix('Input ')}, it is {problem['input']!r}"


def _inner(cls: type, path: Iterable[str]) -> Any:  # noqa: ANN401 - a dataclass
    for name in path:
        cls = get_type_hints(cls)[name]
    return cls
