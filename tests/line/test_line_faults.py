"""Requests of a run go wrong once, in each way: it ends well, or the same command ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import MaskfleetError
from tests.archives import filled, png, problems, segment
from tests.bundles import NoProbe
from tests.faultstore import OF_READS, Killed, faulty
from tests.runs import content

SEEDS = int(os.environ.get("MASKFLEET_SEEDS", "0"))  # .ci/nightly
EXAMPLES = 15 * (1 + SEEDS)
EVERY = 1 if SEEDS else 2  # by day a request goes wrong in half of the ways, the next in the rest
OUT_WAYS = ("busy", "denied", "lost", "twice", "short", "flip")
KILLS = ("killed_before", "killed_after")  # at every write: test_line_resume.py
SOURCE_WAYS = ("busy", "denied", "lost", "twice")  # a flipped input is another input: docs say so


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_bundle):
    """Five pictures, one of them broken, in two fragments, and what an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("faults")
    pictures = {f"{name}.png": png(16, 20, ord(name)) for name in "abde"}
    source = filled(folder / "in", {**pictures, "c.png": b"\x89PNG\r\n\x1a\n"})
    with faulty(folder / "undisturbed", -1, "busy") as out:
        segment(source, folder / "undisturbed", tiny_bundle, NoProbe())
    with faulty(source, -1, "busy") as read:
        segment(source, folder / "again", tiny_bundle, NoProbe())
    return SimpleNamespace(
        folder=folder, source=source, model=tiny_bundle, count=len(out.asked),
        looks=sum(one.startswith("read ") for one in out.asked), reads=len(read.asked),
        expected=content(folder / "undisturbed"),
    )  # fmt: skip


def ends_as_undisturbed(small, out, faults) -> None:
    """Whatever the faults make of one call, the next one makes the run."""
    # A sentence and an exit code: anything else is a bug, and fails here.
    with faults as told, contextlib.suppress(MaskfleetError, Killed):
        segment(small.source, out, small.model, NoProbe())
    segment(small.source, out, small.model, NoProbe())
    assert content(out) == small.expected, told.asked
    assert problems(out) == [], told.asked


@pytest.mark.parametrize("way", OUT_WAYS)
def test_whichever_request_to_the_output_goes_wrong_the_run_ends_as_if_none_had(
    small, tmp_path, in_process, way
):
    assert small.count > 40 > small.looks > 10
    calls = range(1 + OUT_WAYS.index(way) % EVERY, small.count + 1, EVERY)
    kinds = {}
    if way in OF_READS:
        calls, kinds = range(1, small.looks + 1), {"requests": ("read",)}
    for call in calls:
        out = tmp_path / str(call)
        ends_as_undisturbed(small, out, faulty(out, call, way, **kinds))
        shutil.rmtree(out)


@pytest.mark.parametrize("way", SOURCE_WAYS)
def test_whichever_request_to_the_source_goes_wrong_no_image_is_rejected_for_it(
    small, tmp_path, in_process, way
):
    assert small.reads >= 6
    for call in range(1, small.reads + 1):
        ends_as_undisturbed(small, tmp_path / str(call), faulty(small.source, call, way))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(blows=st.lists(st.tuples(st.sampled_from(OUT_WAYS + KILLS), st.integers(1, 60)), max_size=6))
def test_blow_after_blow_it_ends_as_if_there_had_been_none(small, tmp_path, in_process, blows):
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    for way, call in blows:
        with faulty(out, call, way), contextlib.suppress(MaskfleetError, Killed):
            segment(small.source, out, small.model, NoProbe())
    ends_as_undisturbed(small, out, faulty(out, -1, "busy"))
