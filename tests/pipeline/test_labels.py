"""Labelled data: three ways it lies, splits and strata, what is refused, how it is read."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ImageRejected, RunRefused
from pipeline.labels import LabelledSet, check, fragments, hashed_share, open_labelled
from pipeline.ontology import read_ontology
from pipeline.pairing import split_of_path, without_suffix
from pipeline.reader import open_run
from tests.archives import filled, jpeg, png, segment
from tests.labelled import (
    ONTOLOGY,
    SIZES,
    about,
    folder_pair,
    gray_png,
    pairs,
    shard,
    stem,
    table,
    truth,
)
from tests.pictures import blobs, encoded, parquet_of, saved, tar_of, with_orientation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_pair(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run over the same pictures."""
    out = tmp_path_factory.mktemp("run") / "run"
    segment(folder / "images", out, "demo")
    return out


def keys(labelled: LabelledSet) -> list[str]:
    return sorted(item.key for item in labelled.items)


def loaded(labelled: LabelledSet) -> list[tuple[str, bytes, bytes]]:
    found = []
    for item in labelled.items:
        pixels_HWC, labels_HW = labelled.load(item)
        found.append((item.key, pixels_HWC.tobytes(), labels_HW.tobytes()))
    return sorted(found)


def changed(folder, **files: bytes | None):
    """More files below a folder; None takes one away."""
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            filled(folder, {name: content})
    return folder


# the three ways


def test_a_folder_pair_is_every_picture_with_the_mask_of_the_same_name(folder):
    labelled = open_labelled(str(folder))

    assert keys(labelled) == sorted(SIZES)
    assert labelled.splits == {"all": 4}
    for item in labelled.items:
        pixels_HWC, labels_HW = labelled.load(item)
        seed = list(SIZES).index(item.key)
        expected_HW = truth(blobs(*SIZES[item.key], seed))
        assert pixels_HWC.shape == (*SIZES[item.key], 3)
        assert labels_HW.dtype == np.uint8
        assert ((labels_HW == 1) == (expected_HW == 7)).all()
        assert ((labels_HW == 255) == (expected_HW == 9)).all()


def test_the_same_pictures_are_the_same_set_wherever_and_however_they_lie(folder, run, tmp_path):
    both = pairs()
    rows = filled(tmp_path / "rows", {"t.parquet": table(both, key=list(both)), **about()})
    masks = {f"{key}.png": mask for key, (_, mask) in both.items()}
    filled(tmp_path / "corrected", {**masks, **about()})
    sources = [str(folder), str(rows), f"run://{run}?masks={tmp_path / 'corrected'}"]

    first, *others = [open_labelled(source) for source in sources]

    assert [keys(other) for other in others] == [keys(first)] * 2
    assert [other.sha256 for other in others] == [first.sha256] * 2
    assert [loaded(other) for other in others] == [loaded(first)] * 2


@pytest.mark.parametrize("ending", [".mask.png", ".seg.png"])
def test_a_tar_holds_masks_beside_pictures_and_equals_a_table_with_its_keys(tmp_path, ending):
    both = pairs()
    named = {f"t.tar#{key}": pair for key, pair in both.items()}
    filled(tmp_path / "tar", {"t.tar": shard(both, ending), **about()})
    filled(tmp_path / "rows", {"x.parquet": table(named, key=list(named)), **about()})

    tar, rows = open_labelled(str(tmp_path / "tar")), open_labelled(str(tmp_path / "rows"))

    assert keys(tar) == keys(rows) == [f"t.tar#{key}" for key in sorted(SIZES)]
    assert tar.sha256 == rows.sha256
    assert loaded(tar) == loaded(rows)


def test_a_table_without_keys_calls_its_rows_as_a_run_does(tmp_path):
    filled(tmp_path, {"t.parquet": table(pairs()), **about()})

    assert keys(open_labelled(str(tmp_path))) == [f"t.parquet#{n}" for n in range(4)]


def test_tars_tables_and_loose_pairs_may_lie_side_by_side(tmp_path):
    both = pairs()
    image, mask = both["a.jpg"]
    loose = {"x/a.jpg": image, "x/a.mask.png": mask}
    filled(tmp_path, {"t.tar": shard(both), "u.parquet": table(both), **loose, **about()})

    assert len(open_labelled(str(tmp_path)).items) == 9


def test_a_run_over_labelled_pictures_has_their_keys_and_no_masks(tmp_path):
    both = pairs()
    image, mask = both["a.jpg"]
    loose = {"x/a.jpg": image, "x/a.seg.png": mask}
    data = filled(tmp_path / "data", {"t.tar": shard(both), **loose, **about()})

    outcome = segment(data, tmp_path / "run", "demo")

    images = open_run(str(tmp_path / "run")).images
    assert sorted(images["key"].to_pylist()) == keys(open_labelled(str(data)))
    assert outcome.receipt["skipped"] == {".json": 1, "mask": 5}


def test_only_the_corrected_pictures_of_a_run_are_labelled(run, tmp_path):
    mask = pairs()["sub/b.png"][1]
    filled(tmp_path / "corrected", {"sub%2Fb.png.png": mask, **about()})

    labelled = open_labelled(f"run://{run}?masks={tmp_path / 'corrected'}")

    assert keys(labelled) == ["sub/b.png"]


def test_a_run_says_itself_what_its_classes_are(run, tmp_path):
    corrected = np.zeros(SIZES["a.jpg"], np.uint8)
    corrected[:10], corrected[20:] = 1, 255
    filled(tmp_path / "corrected", {"a.jpg.png": encoded(corrected, "PNG")})

    labelled = open_labelled(f"run://{run}?masks={tmp_path / 'corrected'}")

    assert labelled.ontology.names == ["background", "nucleus"]
    assert (labelled.load(labelled.items[0])[1] == corrected).all()


def test_keys_with_odd_characters_name_their_masks(tmp_path):
    both = pairs()
    image, mask = both["a.jpg"]
    members = {"x#1/100%.jpg": image}
    source = filled(tmp_path / "in", {"odd #1.tar": tar_of(members)})
    run = tmp_path / "run"
    segment(source, run, "demo")
    (key,) = ["odd %231.tar#x%231/100%25.jpg"]
    filled(tmp_path / "corrected", {f"{key}.png": mask, **about()})

    labelled = open_labelled(f"run://{run}?masks={tmp_path / 'corrected'}")

    assert keys(labelled) == [key]
    assert labelled.load(labelled.items[0])[0].shape == (64, 80, 3)


# the hash


def test_the_hash_changes_with_key_picture_mask_and_split_and_with_nothing_else(tmp_path):
    def hash_of(name: str, both=None, splits=None) -> str:
        folder = folder_pair(tmp_path / name, both)
        if splits is not None:
            (folder / "dataset.json").write_text(json.dumps({"splits": splits}))
        return open_labelled(str(folder)).sha256

    both = pairs()
    image, mask = both["a.jpg"]
    other_image = encoded(blobs(64, 80, 99), "JPEG")
    other_mask = encoded(np.zeros((64, 80), np.uint8), "PNG")
    rest = {key: pair for key, pair in both.items() if key != "a.jpg"}
    split = {"all": [*both]}

    same = [hash_of("one"), hash_of("two", dict(reversed(both.items()))), hash_of("3", None, split)]
    others = [
        hash_of("renamed", {**rest, "e.jpg": (image, mask)}),
        hash_of("picture", {**rest, "a.jpg": (other_image, mask)}),
        hash_of("mask", {**rest, "a.jpg": (image, other_mask)}),
        hash_of("split", None, {"train": [*both]}),
        hash_of("fewer", rest),
    ]

    assert len(set(same)) == 1
    assert len({*same, *others}) == 6


def test_a_split_has_a_hash_of_its_own(folder, tmp_path):
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": ["a", "d"], "test": ["sub/*"]}))
    labelled = open_labelled(str(folder), splits=str(splits))

    test = labelled.only("test")

    assert test.sha256 == check(test).sha256
    assert keys(test) == ["sub/b.png", "sub/c.png"]
    assert check(test).sha256 not in (None, labelled.sha256)
    with pytest.raises(RunRefused, match=r"no split 'val'; it has: test \(2\), train \(2\)"):
        labelled.only("val")


# splits and strata


@pytest.mark.parametrize(
    "files",
    [
        {"dataset.json": b'{"splits": {"train": ["a", "sub/b.png"], "test": ["d.jpg"]}}'},
        {"train.txt": b"a\nsub/b\n\n", "test.txt": b"d.jpg\r\n"},
    ],
    ids=["json", "text"],
)
def test_split_lists_name_keys_with_or_without_their_suffix(tmp_path, files):
    labelled = open_labelled(str(changed(folder_pair(tmp_path), **files)))

    assert {item.key: item.split for item in labelled.items} == {
        "a.jpg": "train", "sub/b.png": "train", "d.jpg": "test", "sub/c.png": None,
    }  # fmt: skip
    assert labelled.splits == {"test": 1, "train": 2}


def test_a_picture_in_two_splits_and_a_name_that_is_nowhere_are_refused(tmp_path):
    lists = {"train": ["a", "nobody", "sub/*"], "test": ["sub/b"]}
    folder = changed(
        folder_pair(tmp_path), **{"dataset.json": json.dumps({"splits": lists}).encode()}
    )

    with pytest.raises(RunRefused) as refused:
        open_labelled(str(folder))

    assert "names in a split and nowhere else (1): nobody (train)" in str(refused.value)
    assert "pictures in two splits (1): sub/b.png (train, test)" in str(refused.value)


def test_tables_bring_splits_and_strata_in_columns(tmp_path):
    columns = {"split": ["train", "val", None, "test"], "stratum": ["day", None, "dusk", None]}
    strata = b'{"t.parquet#3": "night"}'
    files = {"t.parquet": table(pairs(), **columns), "strata.json": strata, **about()}

    items = open_labelled(str(filled(tmp_path, files))).items

    assert [item.split for item in items] == ["train", "val", None, "test"]
    assert [item.stratum for item in items] == ["day", None, "dusk", "night"]


def test_the_first_pattern_that_matches_gives_the_stratum(folder, tmp_path):
    strata = tmp_path / "strata.json"
    strata.write_text('{"sub/b": "first", "*.png": "drawn", "a": "second", "": "rest"}')

    items = open_labelled(str(folder), strata=str(strata)).items

    assert {item.key: item.stratum for item in items} == {
        "a.jpg": "second", "d.jpg": "rest", "sub/b.png": "first", "sub/c.png": "drawn",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-0001.tar", "train"),
        ("data/validation-00000-of-00003.parquet", "val"),
        ("Test/x.tar", "test"),
        ("trainer.tar", None),
        ("x-train.tar", None),
    ],
)
def test_shards_are_named_for_their_split(path, split):
    assert split_of_path(path) == split


@given(st.lists(st.text(min_size=1), unique=True, max_size=30), st.floats(0, 1), st.text())
def test_a_hashed_share_never_loses_a_key_when_it_grows(some, share, salt):
    chosen = {key for key in some if hashed_share(key, share, salt)}

    assert chosen == {key for key in some if hashed_share(key, share, salt)}
    assert chosen <= {key for key in some if hashed_share(key, min(1.0, share + 0.1), salt)}
    assert not any(hashed_share(key, 0, salt) for key in some)
    assert all(hashed_share(key, 1, salt) for key in some)


def test_a_hashed_share_is_about_that_share_of_any_batch_and_another_with_another_salt():
    names = [f"batch/{n}.jpg" for n in range(4000)]
    one = {name for name in names if hashed_share(name, 0.2, "evaluation")}
    other = {name for name in names if hashed_share(name, 0.2, "canaries")}

    assert 0.17 < len(one) / len(names) < 0.23
    assert 0.02 < len(one & other) / len(names) < 0.06


# ontology


def test_the_form_of_public_data_sets_is_read_and_its_void_is_ignored():
    card = {
        "classes": ["road", "void", "car"],
        "class_ids": {"road": 0, "void": 11, "car": 3},
        "void_id": 11,
        "palette": [[1, 2, 3], [0, 0, 0], [4, 5, 6]],
        "splits": {},
    }
    found = read_ontology(json.dumps(card).encode(), "x")

    assert [(c.id, c.name, c.color) for c in found.classes] == [
        (0, "road", (1, 2, 3)), (3, "car", (4, 5, 6)),
    ]  # fmt: skip
    assert found.ignore_id == 11
    assert found.indexes(np.array([[0, 3, 11]], np.uint8)).tolist() == [[0, 1, 255]]


def test_a_bundles_card_is_an_ontology(tiny_bundle):
    found = read_ontology((tiny_bundle / "model.json").read_bytes(), "x")

    assert found.names == ["background", "nucleus"]


def test_many_classes_make_16_bit_labels():
    classes = [{"id": n * 3, "name": f"c{n}"} for n in range(300)]
    found = read_ontology(json.dumps({"classes": classes}).encode(), "x")

    values = np.array([[0, 897, 65535]], np.uint16)
    assert found.indexes(values).tolist() == [[0, 299, 65535]]
    assert found.indexes(values).dtype == np.uint16


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"classes": []}, "not empty"),
        ({"classes": [{"id": 0, "name": "a"}]}, "two classes or more"),
        ({"classes": [{"id": 0, "name": "a"}, {"id": 0, "name": "b"}]}, "have the id 0"),
        ({"classes": [{"id": 0, "name": "a"}, {"id": 1, "name": "a"}]}, "have the name 'a'"),
        ({"classes": [{"id": 0, "name": "a"}, {"id": 1}]}, "lacks 'name'"),
        ({"classes": [{"id": "0", "name": "a"}, {"id": 1, "name": "b"}]}, "whole number"),
        ({"classes": ["a", "b"], "palette": [[1, 2, 3]]}, "1 colours for 2 classes"),
        ({"classes": ["a", "b"], "class_ids": {"a": 1}}, "lacks 'b'"),
        ({"classes": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}], "ignore_id": 1}, "1 is ig"),
    ],
)
def test_an_ontology_that_cannot_be_is_refused_with_the_reason(card, said):
    with pytest.raises(RunRefused, match=said):
        read_ontology(json.dumps(card).encode(), "x")


def test_data_without_an_ontology_is_refused_until_one_is_given(folder, tmp_path):
    bare = folder_pair(tmp_path / "bare")
    (bare / "ontology.json").unlink()

    with pytest.raises(RunRefused, match="--ontology"):
        open_labelled(str(bare))
    given_one = open_labelled(str(bare), ontology=str(folder / "ontology.json"))
    assert given_one.sha256 == open_labelled(str(folder)).sha256


# what is refused


def refusal(folder, **how) -> str:
    with pytest.raises(RunRefused) as refused:
        open_labelled(str(folder), **how)
    return str(refused.value)


def test_pictures_without_masks_and_masks_without_pictures_are_named(tmp_path):
    both = {
        f"{n:02}.png": (png(9, 9, n), encoded(np.zeros((9, 9), np.uint8), "PNG")) for n in range(14)
    }
    folder = folder_pair(tmp_path, both)
    for n in range(12):
        (folder / f"masks/{n:02}.png").unlink()
    (folder / "images/13.png").unlink()

    said = refusal(folder)

    named = ", ".join(f"{n:02}.png" for n in range(10))
    assert f"pictures without a mask (12): {named} and 2 more" in said
    assert "masks without a picture (1): 13.png" in said


def test_masks_with_other_values_sizes_or_kinds_are_named_with_what_is_wrong(tmp_path):
    both = pairs()
    image, mask = both["a.jpg"]
    strange = np.zeros((64, 80), np.uint8)
    strange[3, 4], strange[5, 6] = 1, 200
    wrong = {
        "a.jpg": (image, encoded(strange, "PNG")),
        "sub/b.png": (both["sub/b.png"][0], mask),
        "sub/c.png": (both["sub/c.png"][0], encoded(blobs(240, 200, 1), "PNG")),
        "d.jpg": (both["d.jpg"][0], both["d.jpg"][1][:60]),
    }

    said = refusal(folder_pair(tmp_path, wrong))

    assert "masks with values that are no class (1): a.png holds 1, 200" in said
    assert (
        "masks of another size than their picture (1): sub/b.png is 80 x 64, its picture 47 x 33"
        in said
    )
    assert "sub/c.png is RGB; a mask holds one class id a pixel" in said
    assert "d.png cannot be read" in said
    assert "masks hold 0 background, 7 nucleus; ignored: 9" in said


def test_a_jpeg_is_no_mask(tmp_path):
    folder = changed(folder_pair(tmp_path), **{"masks/a.jpg": jpeg(64, 80, 1)})

    assert "masks/ holds a.jpg, which is no PNG" in refusal(folder)
    renamed = changed(folder_pair(tmp_path / "2"), **{"masks/a.png": jpeg(64, 80, 1)})
    assert "a.png is no PNG" in refusal(renamed)


def test_two_pictures_of_one_name_are_refused(tmp_path):
    folder = changed(folder_pair(tmp_path), **{"images/a.png": png(64, 80, 0)})

    assert "pictures of one name (1): a.jpg and a.png" in refusal(folder)


def test_tables_with_a_key_twice_or_without_a_mask_are_refused(tmp_path):
    both = pairs()
    twice = filled(tmp_path / "1", {"t.parquet": table(both, key=["x"] * 4), **about()})
    null = {**both, "a.jpg": (both["a.jpg"][0], None)}
    hole = filled(tmp_path / "2", {"t.parquet": table(null), **about()})
    none = filled(tmp_path / "3", {"t.parquet": parquet_of([jpeg(9, 9, 1)]), **about()})

    assert "keys that occur twice (1): x" in refusal(twice)
    assert "t.parquet#0 the cell is null" in refusal(hole)
    assert "t.parquet: no column of mask bytes among image" in refusal(none)


def test_a_damaged_shard_is_refused_since_pictures_would_be_missing(tmp_path):
    both = pairs()
    first = 512 + (len(both["a.jpg"][0]) + 511 & ~511)
    filled(tmp_path, {"t.tar": shard(both)[: first + 100], **about()})

    assert "t.tar is damaged: truncated" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"images/a.jpg": b"x"}, "has images/ and no masks/"),
        ({"masks/a.png": b"x"}, "has masks/ and no images/"),
        ({"a.jpg": b"x"}, "there are no labelled pictures below"),
        ({}, "there are no labelled pictures below"),
    ],
)
def test_a_folder_that_holds_no_labelled_data_is_refused(tmp_path, files, said):
    assert said in refusal(filled(tmp_path, files))


def test_a_place_that_is_not_there_is_refused(tmp_path):
    assert "cannot read the source" in refusal(tmp_path / "nowhere")
    assert "say run://RUN?masks=FOLDER" in refusal(f"run://{tmp_path}")


def test_corrected_masks_of_other_keys_are_refused(run, tmp_path):
    filled(tmp_path / "corrected", {"a.png": pairs()["a.jpg"][1], **about()})

    said = refusal(f"run://{run}?masks={tmp_path / 'corrected'}")

    assert "masks without a picture (1): a.png" in said


# reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_and_masks_are_upright_already(tmp_path, orientation):
    upright_HWC = blobs(40, 56, 3)
    mask_HW = truth(upright_HWC)
    pair = with_orientation(upright_HWC, orientation), encoded(mask_HW, "PNG")

    labelled = open_labelled(str(folder_pair(tmp_path, {"a.jpg": pair})))
    pixels_HWC, labels_HW = labelled.load(labelled.items[0])

    assert pixels_HWC.shape[:2] == labels_HW.shape == (40, 56)
    assert abs(pixels_HWC.astype(int) - upright_HWC).mean() < 4
    assert ((labels_HW == 1) == (mask_HW == 7)).all()


def test_a_png_that_is_turned_by_its_exif_needs_a_mask_of_the_upright_size(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    lying = encoded(blobs(30, 50, 1), "PNG", exif=exif)
    upright = encoded(np.zeros((50, 30), np.uint8), "PNG")
    stored = encoded(np.zeros((30, 50), np.uint8), "PNG")

    open_labelled(str(folder_pair(tmp_path / "good", {"a.png": (lying, upright)})))
    said = refusal(folder_pair(tmp_path / "bad", {"a.png": (lying, stored)}))

    assert "a.png is 50 x 30, its picture 30 x 50" in said


def masks_of_every_kind() -> dict[str, bytes]:
    """The same mask of ids 0 and 1, stored in every way."""
    values = (blobs(24, 31, 5)[..., 0] > 60).astype(np.uint8)
    palette = Image.fromarray(values).convert("L")
    palette = Image.frombytes("P", palette.size, values.tobytes())
    palette.putpalette([200, 10, 10, 10, 200, 10])
    return {
        "gray 1": gray_png(values, 1),
        "gray 2": gray_png(values, 2),
        "gray 4": gray_png(values, 4),
        "gray 8": encoded(values, "PNG"),
        "gray 16": encoded(values.astype(np.uint16), "PNG"),
        "palette 1": saved(palette, "PNG", bits=1),
        "palette 4": saved(palette, "PNG", bits=4),
        "palette 8": saved(palette, "PNG", bits=8),
    }


@pytest.mark.parametrize("kind", masks_of_every_kind())
def test_masks_of_every_depth_are_read_as_ids(tmp_path, kind):
    values = (blobs(24, 31, 5)[..., 0] > 60).astype(np.uint8)
    folder = folder_pair(tmp_path, {"a.png": (png(24, 31, 5), masks_of_every_kind()[kind])})
    (folder / "ontology.json").write_text(json.dumps({"classes": ["no", "yes"]}))

    labelled = open_labelled(str(folder))

    assert (labelled.load(labelled.items[0])[1] == values).all()


def test_ids_beyond_255_are_read_from_16_bits(tmp_path):
    values = np.array([[0, 1000], [65535, 1000]], np.uint16)
    folder = folder_pair(tmp_path, {"a.png": (png(2, 2, 5), encoded(values, "PNG"))})
    classes = [{"id": 0, "name": "no"}, {"id": 1000, "name": "yes"}]
    (folder / "ontology.json").write_text(json.dumps({"classes": classes}))

    labelled = open_labelled(str(folder))

    assert labelled.load(labelled.items[0])[1].tolist() == [[0, 1], [255, 1]]


def test_where_a_picture_holds_no_data_there_is_nothing_to_learn(tmp_path):
    picture = np.dstack([blobs(20, 20, 5), np.full((20, 20), 255, np.uint8)])
    picture[:5, :, 3] = 0
    mask = encoded(np.full((20, 20), 7, np.uint8), "PNG")

    labelled = open_labelled(str(folder_pair(tmp_path, {"a.png": (encoded(picture, "PNG"), mask)})))
    labels_HW = labelled.load(labelled.items[0])[1]

    assert (labels_HW[:5] == 255).all()
    assert (labels_HW[5:] == 1).all()


def test_16_bit_pictures_stay_16_bit(tmp_path):
    deep = blobs(20, 24, 6)[..., 0].astype(np.uint16) << 8
    pair = encoded(deep, "PNG"), encoded(np.zeros((20, 24), np.uint8), "PNG")

    labelled = open_labelled(str(folder_pair(tmp_path, {"a.png": pair})))

    assert (labelled.load(labelled.items[0])[0][..., 0] == deep).all()


def test_a_broken_picture_is_no_reason_to_refuse_and_is_rejected_when_it_is_read(tmp_path):
    both = pairs()
    image, mask = both["a.jpg"]

    labelled = open_labelled(str(folder_pair(tmp_path, {**both, "a.jpg": (image[:300], mask)})))

    with pytest.raises(ImageRejected) as rejected:
        labelled.load(labelled.items[0])
    assert rejected.value.reason == "truncated"


def test_a_loader_reads_the_same_in_other_threads_and_processes(folder):
    labelled = open_labelled(str(folder))
    expected = loaded(labelled)
    loader = pickle.loads(pickle.dumps(labelled.loader))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(loader.load, pickle.loads(pickle.dumps(labelled.items))))

    named = zip(labelled.items, found, strict=True)
    assert sorted((i.key, p.tobytes(), m.tobytes()) for i, (p, m) in named) == expected


def test_rows_of_a_table_can_be_read_in_any_order(tmp_path):
    filled(tmp_path, {"t.parquet": table(pairs()), **about()})
    labelled = open_labelled(str(tmp_path))
    forward = loaded(labelled)

    assert loaded(labelled.among(reversed(labelled.items))) == forward
    assert check(labelled.among(reversed(labelled.items))).sha256 == labelled.sha256


@given(st.lists(st.integers(1, 100), max_size=200))
def test_fragments_hold_every_picture_once_in_order_and_no_more_than_they_may(sizes):
    both = [_item(n, size) for n, size in enumerate(sizes)]
    parts = list(fragments(both))

    assert list(chain.from_iterable(parts)) == both
    assert all(0 < len(part) <= 16 for part in parts)


def _item(number: int, nbytes: int):
    from pipeline.labels import LabelledItem
    from pipeline.records import PlannedImage

    plan = PlannedImage(number, str(number), "", None, None, nbytes, "", "files", 0)
    return LabelledItem(str(number), plan, plan, None, None)


@given(st.text(alphabet="ab./#%", min_size=1))
def test_a_suffix_is_taken_off_once_at_most(key):
    assert without_suffix(f"{key}.png") == key
    assert stem(f"{key}.png") == key
    assert key.startswith(without_suffix(key))


def test_what_is_said_of_the_ontology_is_short():
    found = read_ontology(json.dumps(ONTOLOGY).encode(), "x")

    assert found.shown() == "0 background, 7 nucleus; ignored: 9"
