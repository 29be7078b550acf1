"""What we depend on is new enough where it matters, and says why it is asked for."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
DEPENDENCIES = [Requirement(text) for text in tomllib.loads(PROJECT)["project"]["dependencies"]]

FLOORS = {
    "pillow": ("13.0.0", "its JPEG decoder wrote out of bounds: CVE-2026-112398, CVE-2026-112403"),
    "ray": ("2.56", "read_webdataset unpickled: CVE-2026-57516; token auth since 2.52"),
    "torch": ("2.6", "torch.load could be made to run code: CVE-2025-32434"),
    "pyarrow": ("14.0.1", "Parquet extension types ran code: CVE-2023-47248"),
    "botocore": ("1.36", "honours If-None-Match on put_object, which commits rest on"),
    "urllib3": ("2.5.0", "followed redirects it was told not to: CVE-2025-50181"),
    "jinja2": ("3.1.6", "its sandbox could be left: CVE-2025-27516 (Ray brings it)"),
    "aiohttp": ("3.10.11", "request smuggling: CVE-2024-52304 (s3fs and Ray bring it)"),
}
"""Versions below these must not be used, and why (also of what our dependencies bring along)."""


@pytest.mark.parametrize("name", FLOORS)
def test_what_is_installed_is_not_below_its_floor(name):
    floor, why = FLOORS[name]
    assert Version(version(name)) >= Version(floor), why


def test_no_dependency_of_ours_allows_less_than_its_floor():
    for wanted in DEPENDENCIES:
        floor = FLOORS.get(wanted.name, ("0", ""))[0]
        lowest = min(Version(part.version.removesuffix(".*")) for part in wanted.specifier
                     if part.operator in {">=", "=="})  # fmt: skip
        assert lowest >= Version(floor), wanted


def test_every_dependency_has_a_floor_and_a_reason():
    lines = re.search(r"\ndependencies = \[\n(.*?)\n\]", PROJECT, re.DOTALL)[1].splitlines()
    assert len(lines) == len(DEPENDENCIES)
    for line, wanted in zip(lines, DEPENDENCIES, strict=True):
        assert any(part.operator in {">=", "=="} for part in wanted.specifier), line
        assert re.search(r",\s*# \w", line), f"why this version? {line}"
