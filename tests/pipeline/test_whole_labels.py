"""Whole pictures with a class: where it is said, what is refused, how it is read."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import train
from pipeline.errors import RunRefused
from pipeline.labels import LabelledSet, open_labelled
from tests.archives import filled
from tests.learning import whole_pictures
from tests.pictures import tar_of

FOUR = whole_pictures(range(4))
TRUTH = {name: label for name, (label, _) in FOUR.items()}
FILES = {name: data for name, (_, data) in FOUR.items()}
CLASSES = {"classes": [{"id": 5, "name": "dark"}, {"id": 2, "name": "bright"}]}
ONTOLOGY = {"ontology.json": json.dumps(CLASSES).encode()}


def labels_csv(rows: dict[str, str], head: str = "key,label") -> dict[str, bytes]:
    lines = [head, *(f"{key},{label}" for key, label in rows.items())]
    return {"labels.csv": "\n".join(lines).encode()}


def table(label: pa.Array, **columns: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": list(FILES.values()), "label": label, **columns}), sink)
    return sink.getvalue()


def opened(folder, **how) -> LabelledSet:
    return open_labelled(str(folder), **how)


def truths(labelled: LabelledSet) -> dict[str, str]:
    """The class of each picture as it is loaded, by the last part of its key."""
    found = {}
    for item in labelled.items:
        pixels_HWC, labels_HW = labelled.load(item)
        assert pixels_HWC.shape[2] == 3
        assert labels_HW.shape == (1, 1)
        place = labels_HW.item()
        found[item.key.replace("#", "/").rpartition("/")[2]] = labelled.ontology.names[place]
    return found


def refusal(folder, **how) -> str:
    with pytest.raises(RunRefused) as caught:
        opened(folder, **how)
    return str(caught.value)


def test_a_class_is_the_folder_a_picture_lies_in_loose_or_in_a_tar(tmp_path):
    foldered = {f"{label}/{name}": data for name, (label, data) in FOUR.items()}
    loose = opened(filled(tmp_path / "loose", foldered))
    tar = opened(filled(tmp_path / "tar", {"s.tar": tar_of(foldered)}))

    assert truths(loose) == truths(tar) == TRUTH
    assert loose.task == tar.task == "classify"
    assert loose.ontology.names == ["bright", "dark"]
    assert loose.sha256


def test_folders_above_the_class_may_be_splits(tmp_path):
    foldered = {
        f"{'train' if n < 2 else 'test'}/{label}/{name}": data
        for n, (name, (label, data)) in enumerate(FOUR.items())
    }

    labelled = opened(filled(tmp_path, foldered))

    assert labelled.splits == {"test": 2, "train": 2}
    assert truths(labelled) == TRUTH


def test_a_table_beside_the_pictures_says_class_split_and_stratum(tmp_path):
    rows = {name: f"{label},test,night" for name, label in TRUTH.items()}
    named = labels_csv(rows, "key,label,split,stratum")

    labelled = opened(filled(tmp_path, {**FILES, **named}))

    assert truths(labelled) == TRUTH
    assert labelled.splits == {"test": 4}
    assert {item.stratum for item in labelled.items} == {"night"}


def test_a_picture_with_an_empty_label_is_left_out(tmp_path):
    rows = {**TRUTH, "0002.png": ""}

    assert "0002.png" not in truths(opened(filled(tmp_path, {**FILES, **labels_csv(rows)})))


def test_a_column_of_names_or_of_ids_says_the_class(tmp_path):
    names = filled(tmp_path / "names", {"t.parquet": table(pa.array(TRUTH.values()))})
    ids = pa.array([{"dark": 5, "bright": 2}[label] for label in TRUTH.values()])
    rows = table(ids, key=list(TRUTH))
    numbers = filled(tmp_path / "ids", {"t.parquet": rows, **ONTOLOGY})

    assert list(truths(opened(names)).values()) == list(TRUTH.values())
    assert truths(opened(numbers)) == TRUTH
    assert opened(numbers).ontology.names == ["dark", "bright"]


def test_a_member_beside_the_picture_says_the_class_by_id(tmp_path):
    members = {}
    for name, (label, data) in FOUR.items():
        stem = name.removesuffix(".png")
        members |= {name: data, f"{stem}.cls": b"5\n" if label == "dark" else b"2"}

    labelled = opened(filled(tmp_path, {"s.tar": tar_of(members), **ONTOLOGY}))

    assert truths(labelled) == TRUTH


def test_the_hash_is_of_pictures_and_classes_and_not_of_where_they_are_said(tmp_path):
    both = {**ONTOLOGY, **labels_csv(TRUTH)}
    rows = table(pa.array(TRUTH.values()), key=list(TRUTH))
    other = {**TRUTH, "0000.png": "bright"}

    loose = opened(filled(tmp_path / "loose", {**FILES, **both})).sha256
    shard = opened(filled(tmp_path / "shard", {"t.parquet": rows, **ONTOLOGY})).sha256
    changed = opened(filled(tmp_path / "changed", {**FILES, **labels_csv(other)})).sha256

    assert loose == shard != changed


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({**FILES, **labels_csv({**TRUTH, "x.png": "dark"})}, "nowhere else (1): x.png"),
        ({**FILES, **labels_csv({"0000.png": "dark"})}, "labels.csv does not name (3): 0001.png"),
        ({**FILES, **labels_csv(TRUTH, "name,label")}, "the columns name, label; it needs key and"),
        ({**FILES, "labels.csv": b"key,label\n0000.png,dark\n0000.png,dark"}, "0000.png twice"),
        ({**FILES, "labels.csv": b"\xff\xfe"}, "is not UTF-8"),
        ({**FILES, **labels_csv(dict.fromkeys(TRUTH, "3"))}, "what the labels of"),
        ({**FILES, **ONTOLOGY, **labels_csv({**TRUTH, "0001.png": "dusk"})}, "dusk of 0001.png"),
        ({"t.parquet": table(pa.array([None, *list(TRUTH.values())[1:]]))}, "t.parquet#0"),
        ({"t.parquet": table(pa.array([[1]] * 4))}, "t.parquet: "),
        (FILES, "no folders named as classes"),
        ({f"one/{name}": data for name, data in FILES.items()}, "there are no labelled pictures"),
        ({f"{'train' if n % 2 else 'val'}/{name}": data for n, (name, data) in
          enumerate(FILES.items())}, "there are no labelled pictures"),
        ({f"images/{name}": data for name, data in FILES.items()}, "has images/ and no masks/"),
    ],
)  # fmt: skip
def test_what_says_no_class_is_refused_by_name(tmp_path, files, said):
    assert said in refusal(filled(tmp_path, files))


def test_a_segmenter_does_not_learn_from_classes_of_whole_pictures(tmp_path):

    data = filled(
        tmp_path / "data", {f"{TRUTH[name]}/{name}": data for name, data in FILES.items()}
    )

    assert train.main([str(data), "--model", "latent_attention", "--out", str(tmp_path / "r")]) == 2


def test_pixels_and_classes_are_those_of_the_picture(tmp_path):
    labelled = opened(filled(tmp_path, {**FILES, **labels_csv(TRUTH)}))

    for item in labelled.items:
        pixels_HWC, labels_HW = labelled.load(item)
        bright = np.median(pixels_HWC) > 127
        assert labelled.ontology.names[labels_HW.item()] == ("bright" if bright else "dark")
