"""An image that kills or hangs its process costs one image; the run goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import open_run
from tests.pictures import blobs, encoded

ROOT = Path(__file__).parents[2]

# Python imports a module of this name at its start: every process of the run gets a decoder that
# dies or hangs on a marked picture, as a bug in an image library would make it.
POISONED = """
import os, time
import pipeline.decode as station
real = station.decode
def decode(data, limits):
    if data.endswith(b"KILL"):
        os.abort()
    if data.endswith(b"HANG"):
        time.sleep(3600)
    return real(data, limits)
station.decode = decode
"""


@pytest.fixture
def poisoned(tmp_path):
    """A function that runs `maskfleet segment` on six good pictures and one marked one."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(POISONED)
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(6):
        (source / f"good-{number}.jpg").write_bytes(encoded(blobs(60, 80, number), "JPEG"))

    def segment(mark: bytes, *flags: str) -> int:
        marked = source / "good-3-marked.jpg"
        if not marked.exists():  # written again it would be a changed picture, and a new round
            marked.write_bytes(encoded(blobs(60, 80, 9), "JPEG") + mark)
        path = os.pathsep.join([str(tmp_path / "start"), str(ROOT)])
        command = [
            sys.executable,
            "-m",
            "jobs",
            "segment",
            str(source),
            "--out",
            str(tmp_path / "run"),
            *flags,
        ]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, timeout=100, check=False
        )
        return done.returncode

    segment.run = str(tmp_path / "run")
    return segment


def rejections(uri: str) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in open_run(uri).rejected.to_pylist()}


def test_an_image_that_kills_its_process_is_rejected_by_the_second_call(poisoned):
    assert poisoned(b"KILL", "--on", "process") < 0
    assert poisoned(b"KILL", "--on", "process") == 3
    assert rejections(poisoned.run) == {"good-3-marked.jpg": "killed_decode"}
    assert open_run(poisoned.run).images.num_rows == 7


def test_an_image_that_hangs_is_rejected_by_the_second_call(poisoned):
    flags = ("--on", "process", "--compute.no-progress-s", "5", "--compute.image-timeout-s", "3")
    assert poisoned(b"HANG", *flags) == 4
    assert poisoned(b"HANG", *flags) == 3
    assert rejections(poisoned.run) == {"good-3-marked.jpg": "timeout"}


def test_on_ray_an_image_that_kills_its_worker_is_rejected_within_one_call(poisoned):
    assert poisoned(b"KILL", "--on", "local") == 3
    assert rejections(poisoned.run) == {"good-3-marked.jpg": "killed_decode"}
