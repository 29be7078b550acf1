"""The nouns of a registry: a version and where it comes from, what an alias meant, a reference."""

import contextlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from pipeline.errors import RunRefused
from pipeline.keys import printable
from pipeline.storage import open_store

RESERVED = ("aliases", "decisions", "trainings", "retrainings")
NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
NUMBER = re.compile(r"v([0-9]{4}|[1-9][0-9]{4,8})")

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a version comes from: what its maker says of it."""

    training: str
    """Whose version it is: one training has one version, however often it publishes."""
    parent: str | None = None
    """The version it was trained from, as NAME/v0007."""
    data_sha256: str | None = None
    """Hash of the data it was trained on."""
    recipe: Json = field(default_factory=dict)
    metrics: Json = field(default_factory=dict)
    """Figures by name, no NaNs. The registry's list shows `miou`."""

    def __post_init__(self) -> None:
        if not self.training.strip():
            raise RunRefused("a version needs the id of its training")
        if self.parent is not None and split(self.parent) is None:
            raise RunRefused(f"parent {printable(self.parent)} is not of the form NAME/v0007")


@dataclass(frozen=True, slots=True)
class Version:
    """A model in a registry; it never changes."""

    registry: str
    """The registry's URI."""
    name: str
    number: int
    sha256: str
    """Of the bundle: its card, and through it its weights."""
    training: str
    parent: str | None
    data_sha256: str | None
    recipe: Json
    metrics: Json
    code: Json
    created: str

    @property
    def path(self) -> str:
        """NAME/v0007: the folder below the registry."""
        return path_of(self.name, self.number)

    @property
    def reference(self) -> str:
        """NAME/v0007@REGISTRY."""
        return f"{self.path}@{self.registry}"

    @property
    def uri(self) -> str:
        """The folder, which is a bundle."""
        return f"{self.registry}/{self.path}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What an alias meant from some moment on."""

    alias: str
    number: int
    version: str
    sha256: str
    when: str
    reason: str
    decision: str | None
    """The folder of the decision it rests on."""
    forced: bool
    previous: str | None
    """The version before."""


def path_of(name: str, number: int) -> str:
    """NAME/v0007."""
    return f"{name}/v{number:04d}"


def split(path: str) -> tuple[str, int] | None:
    """Name and number of NAME/v0007, or None."""
    name, _, rest = path.partition("/")
    match = NUMBER.fullmatch(rest)
    return (name, int(match.group(1))) if match and is_name(name) else None


def is_name(text: str) -> bool:
    """Whether it can name a model or an alias: one step of a path, without tricks."""
    return len(text) <= 64 and text not in RESERVED and bool(NAME.fullmatch(text))


def checked_name(text: str, what: str = "a name") -> str:
    """A name of a model or an alias.

    Raises:
        RunRefused: if it could be anything else.
    """
    if not is_name(text):
        raise RunRefused(
            f"{printable(text)!r} cannot be {what}: lower-case letters and digits, with single "
            f". - _ between them, at most 64, and not {' or '.join(RESERVED)}"
        )
    return text


@dataclass(frozen=True, slots=True)
class Reference:
    """``champion@REGISTRY`` or ``NAME/v0007@REGISTRY``."""

    what: str
    registry: str

    @property
    def is_alias(self) -> bool:
        """Whether it may mean another version tomorrow."""
        return "/" not in self.what


def parse(text: str) -> Reference | None:
    """The reference that a text is, or None: a path, a URI.

    A folder of this machine that looks like a reference is written ``./name@place``.
    """
    what, at, registry = text.partition("@")
    if not at or not registry or not (is_name(what) or split(what)):
        return None
    return Reference(what, open_store(registry).uri)


def code_version() -> Json:
    """The package's version, and the commit it stands at where it is run from a git checkout."""
    root, git = Path(__file__).parents[1], shutil.which("git")
    commit = None
    if git and (root / ".git").exists():
        words = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # a question must write nothing
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(  # noqa: S603 - fixed words
                [git, "-C", str(root), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
                env=quiet,
            ).stdout.strip()
    return {"maskfleet": package_version("maskfleet"), "commit": commit}
