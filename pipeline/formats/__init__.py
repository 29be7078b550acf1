"""How images lie in an archive: every file of this folder is a format.

A format module offers

* ``SUFFIXES``: file name endings that suggest it;
* ``index(store, found) -> Iterator[Entry]``: the images inside one object, in a fixed order;
* ``fetch(store, images, threads, limit) -> Iterator[EncodedImage]``: their encoded bytes, in order.

A dotted name (``acme.dicom``) loads a format from outside, from the command line only: a run
folder that names one does not get its code run by whoever looks into it.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, Protocol, cast

from pipeline.errors import RunRefused
from pipeline.records import EncodedImage, PlannedImage
from pipeline.storage import Found, Store


class Entry(NamedTuple):
    """One image inside an object, before it has a number (a tuple, like `Found`)."""

    member: str | None
    """Escaped, unique within the object (pipeline/keys.py); None for a loose file."""
    offset: int | None
    nbytes: int
    problem: str | None = None
    """``reason: detail`` where it is known already that there will be no mask."""
    skipped: bool = False
    """A sidecar: counted, not an image. With a member: the label of a picture beside it."""
    mask: bool = False
    """The label of a picture beside it: counted, unless labelled data is read."""


class Format(Protocol):
    """What a module of this folder offers."""

    SUFFIXES: tuple[str, ...]

    def index(self, store: Store, found: Found) -> Iterator[Entry]:
        """The images inside one object."""
        ...

    def fetch(
        self, store: Store, images: Sequence[PlannedImage], threads: int, limit: int
    ) -> Iterator[EncodedImage]:
        """Encoded bytes of images of one fragment, in their order."""
        ...


def names() -> list[str]:
    """The formats this project knows: the files of this folder."""
    return [m.name for m in iter_modules(__path__) if not m.ispkg]


def load(name: str, asked: str = "auto") -> Format:
    """The format of that name.

    Args:
        name: a file of this folder; or a module elsewhere, if it is what was asked for, or has been
            imported by whoever calls.
        asked: `--format` of the call.

    Raises:
        RunRefused: if there is none, listing those there are.
    """
    if "." in name and name != asked and name not in sys.modules:
        raise RunRefused(
            f"the archive was planned with format {name}, and code is not loaded because a run "
            f"folder names it; if you trust that module, import {name} first"
        )
    if "." not in name and name not in names():
        raise RunRefused(
            f"--format {name}: there is no such format; there are: auto, {', '.join(names())}"
        )
    try:
        return cast("Format", import_module(name if "." in name else f"pipeline.formats.{name}"))
    except ImportError as error:
        raise RunRefused(f"--format {name}: {error}") from error
