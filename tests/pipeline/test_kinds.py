"""The one rule that says, by name, what is a picture, a shard, or nothing to look at."""

import pytest

from pipeline.kinds import (
    FOREIGN,
    MASK_ENDINGS,
    OURS,
    SIDECAR_NAMES,
    SIDECARS,
    kind_of_name,
    picture_of_mask,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpg", "image"),
        ("A/B.JPEG", "image"),
        ("no-extension", "image"),
        ("scan.svg", "image"),  # a picture, if not one of ours: it must end as a row
        ("a.mask.png", "mask"),
        ("A/B.SEG.PNG", "mask"),
        ("mask.png", "image"),
        ("a.mask.jpg", "image"),  # no mask can be lossy
        ("a.seg.png/b.png", "image"),
        (".mask.png", "skip"),
        ("a.tar", "webdataset"),
        ("part-0.parquet", "parquet"),
        ("part-0.PQ", "parquet"),
        ("a.json", "skip"),
        ("a.tar.gz", "skip"),
        ("model.pkl", "skip"),
        ("folder/", "skip"),
        ("README", "skip"),
        ("README.md", "skip"),
        ("Thumbs.db", "skip"),
        (".DS_Store", "skip"),
        (".git/a.jpg", "skip"),
        ("._a.jpg", "skip"),
        ("./a.jpg", "image"),  # as tar writes it
        ("../a.jpg", "image"),
        ("a.jpg.xyz", "unknown"),
        ("a.dat", "unknown"),
        ("v1.2", "unknown"),
        ("ends-with-dot.", "unknown"),
        ("a.jpg/b", "image"),
    ],
)
def test_a_name_has_one_kind(name, kind):
    assert kind_of_name(name) == kind


def test_no_suffix_is_in_two_lists():
    assert not OURS & FOREIGN
    assert not (OURS | FOREIGN) & SIDECARS
    assert all(suffix == suffix.lower() for suffix in OURS | FOREIGN | SIDECARS | SIDECAR_NAMES)


@pytest.mark.parametrize("ending", [*MASK_ENDINGS, ".Mask.PNG"])
def test_a_mask_names_its_picture_and_nothing_else_does(ending):
    assert picture_of_mask(f"s.tar#x/a.b{ending}") == "s.tar#x/a.b"
    assert picture_of_mask(f"a{ending}.png") is None
    assert picture_of_mask("a.png") is None
