"""The peers of benchmarks/peers do the work of `segment`: the plain loop, on both kinds of source.

Ray Data, Daft and the DataLoader take seconds to start; the race itself checks them at every run.
"""

import json
import sys
from collections import Counter

import numcodecs
import numpy as np
import pytest

from benchmarks.peers import plain_loop
from benchmarks.peers.same_work import differing, of_peer, of_run
from jobs import segment
from pipeline import open_run
from tests.archives import filled
from tests.pictures import blobs, encoded, tar_of

SIZES = ((64, 96), (61, 47), (64, 96), (130, 33), (64, 96))


def pictures() -> dict[str, bytes]:
    """Some of one size and some of others, gray and coloured."""
    made = {f"{i}.jpg": encoded(blobs(*size, i), "JPEG") for i, size in enumerate(SIZES)}
    return {**made, "gray.png": encoded(blobs(50, 70, 9)[..., :1], "PNG")}


def sources() -> dict[str, dict[str, bytes]]:
    """The same pictures, loose and in shards."""
    members = pictures()
    halves = [dict(list(members.items())[:3]), dict(list(members.items())[3:])]
    return {
        "files": {f"below/{name}": data for name, data in members.items()},
        "shards": {f"{i}.tar": tar_of(half) for i, half in enumerate(halves)},
    }


@pytest.mark.parametrize("kind", ["files", "shards"])
@pytest.mark.parametrize("form", ["plain", "folded"])
def test_a_loop_counts_the_pixels_that_a_run_counts(tmp_path, monkeypatch, capsys, kind, form):
    filled(tmp_path / "in", sources()[kind])
    words = ["plain_loop", tmp_path / "in", tmp_path / "theirs", "--form", form, "--threads", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--batch", "4"])

    plain_loop.main()
    line = json.loads(capsys.readouterr().out)
    segment.main([str(tmp_path / "in"), "--out", str(tmp_path / "ours"), "--on", "process"])

    ours, theirs = of_run(tmp_path / "ours"), of_peer(tmp_path / "theirs")
    assert differing(ours, theirs) < 1e-4
    assert line["pictures"] == len(SIZES) + 1
    assert sum(line["pixels_by_class"].values()) == ours.total()
    assert min(line["pixels_by_class"].values()) > 0


def test_a_mask_of_the_loop_is_the_mask_of_the_run(tmp_path, monkeypatch):
    filled(tmp_path / "in", {"a.jpg": encoded(blobs(80, 120, 3), "JPEG")})
    words = ["plain_loop", tmp_path / "in", tmp_path / "theirs", "--threads", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])

    plain_loop.main()
    segment.main([str(tmp_path / "in"), "--out", str(tmp_path / "ours"), "--on", "process"])

    theirs = numcodecs.Zstd().decode((tmp_path / "theirs/masks/a.jpg.zst").read_bytes())
    mask = open_run(str(tmp_path / "ours")).mask("a.jpg")
    assert (np.frombuffer(theirs, np.uint8).reshape(80, 120) != mask).mean() < 1e-3


def test_other_pictures_are_other_work():
    with pytest.raises(ValueError, match=r"not the same pictures or sizes: \['b.jpg'\]"):
        differing(counted("a.jpg", 5, 5), counted("a.jpg", 5, 5) + counted("b.jpg", 1, 2))


def test_pixels_that_moved_from_class_to_class_are_counted_once():
    assert differing(counted("a.jpg", 6, 4), counted("a.jpg", 5, 5)) == pytest.approx(0.1)


def counted(key, *pixels):
    return Counter({(key, class_id): count for class_id, count in enumerate(pixels)})
