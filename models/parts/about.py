"""What people want to know of an architecture before they choose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from models.parts.configs import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """A model file's word on itself: `ABOUT` in every file of models/."""

    paper: str
    """Where the idea comes from, to be cited."""
    good_for: str
    """When to take it, in half a sentence."""
    licence: str
    """Of the idea as others published it, and of weights that exist elsewhere. Ours is ours."""
    variants: Mapping[str, Mapping[str, Json]]
    """Configs worth a row in a table, by name; the first one is what the document specifies."""
