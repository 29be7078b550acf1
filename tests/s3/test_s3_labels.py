"""Labelled data in a bucket: the same set, the same figures, as on a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import evaluate
from pipeline.labels import open_labelled
from pipeline.storage import open_store, s3
from pipeline.tables import read_table
from tests.labelled import about, folder_pair, pairs, shard, table


@pytest.fixture
def prefix(bucket, monkeypatch) -> str:
    monkeypatch.setattr(s3, "_made", {})
    return f"s3://{bucket}/labelled"


def copied(folder: Path, to: str) -> str:
    store = open_store(to)
    for path in folder.rglob("*"):
        if path.is_file():
            store.replace(str(path.relative_to(folder)), path.read_bytes())
    return to


def test_the_hash_does_not_depend_on_where_the_pictures_lie(prefix, tmp_path):
    folder = folder_pair(tmp_path)

    there = open_labelled(copied(folder, prefix))

    assert there.sha256 == open_labelled(str(folder)).sha256
    image, labels = there.load(there.items[0])
    assert image.shape[:2] == labels.shape


def test_shards_are_read_by_parts(prefix):
    store = open_store(prefix)
    both = pairs()
    named = {f"t.tar#{key}": pair for key, pair in both.items()}
    for path, content in {
        "tar/t.tar": shard(both), "rows/x.parquet": table(named, key=list(named)),
        "tar/ontology.json": about()["ontology.json"],
        "rows/ontology.json": about()["ontology.json"],
    }.items():  # fmt: skip
        store.replace(path, content)

    tar, rows = open_labelled(f"{prefix}/tar"), open_labelled(f"{prefix}/rows")

    assert tar.sha256 == rows.sha256
    assert len(tar.items) == 4


def test_a_model_is_measured_from_a_bucket_into_a_bucket(prefix, tiny_bundle, tmp_path, capsys):
    folder = folder_pair(tmp_path)
    for data, out in (
        (str(folder), str(tmp_path / "out")),
        (copied(folder, prefix), f"{prefix}-out"),
    ):
        words = [str(tiny_bundle), data, "--out", out, "--batch.pixels", "65536"]
        assert evaluate.main(words) == 0

    tables = [
        read_table(open_store(place).read("evaluation.parquet")).drop_columns("seconds")
        for place in (str(tmp_path / "out"), f"{prefix}-out")
    ]
    assert tables[0].equals(tables[1])
    assert "mean" in capsys.readouterr().out
