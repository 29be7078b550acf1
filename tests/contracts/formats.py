"""What every file of pipeline/formats/ promises; a test class inherits it and writes the shards."""

import os
import zlib
from pathlib import Path

import pytest

from pipeline import formats
from pipeline.config import from_mapping
from pipeline.keys import escape
from pipeline.listing import Listing, discover, key_of
from pipeline.records import EncodedImage, PlannedImage
from pipeline.storage import LocalStore
from tests.pictures import blobs, encoded

LIMIT = 1 << 20
PICTURES = [encoded(blobs(20, 24, seed), "PNG") for seed in range(5)]


def planned(store: LocalStore, format_name: str = "auto") -> list[PlannedImage]:
    """The images of an archive as a plan would list them."""
    values = {"source": store.uri, "out": "/nowhere", "format": format_name}
    images = []
    for number, (found, name, entry) in enumerate(discover(store, from_mapping(values), Listing())):
        images.append(
            PlannedImage(
                number,
                key_of(found, entry),
                f"{store.uri}/{escape(found.path)}",
                entry.member,
                entry.offset,
                entry.nbytes,
                found.etag,
                name,
                0,
                entry.problem,
            )
        )
    return images


def fetched(
    store: LocalStore, images: list[PlannedImage], limit: int = LIMIT
) -> list[EncodedImage]:
    wanted = [image for image in images if not image.problem]
    if not wanted:
        return []
    return list(formats.load(wanted[0].format).fetch(store, wanted, 4, limit))


class FormatContract:
    """Inherit, name the format, and write archives; every test here is then yours."""

    format_name: str

    def write(self, folder: Path, pictures: list[bytes]) -> None:
        """Put the pictures into a folder, in one shard if there are shards."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path):
        (tmp_path / "archive").mkdir()
        return LocalStore(tmp_path / "archive")

    @pytest.fixture
    def archive(self, store):
        self.write(store.root, PICTURES)
        return store

    def test_the_folder_lists_it(self):
        assert self.format_name in formats.names()
        assert formats.load(self.format_name).SUFFIXES

    def test_it_is_found_by_content_and_name_and_gives_what_was_written(self, archive):
        images = planned(archive)

        assert {image.format for image in images} == {self.format_name}
        assert [item.data for item in fetched(archive, images)] == PICTURES

    def test_the_order_is_fixed(self, archive):
        assert planned(archive) == planned(archive)

    def test_keys_are_unique(self, archive):
        keys = [image.key for image in planned(archive)]

        assert len(set(keys)) == len(keys) == len(PICTURES)

    def test_reading_twice_gives_the_same_bytes(self, archive):
        images = planned(archive)

        assert fetched(archive, images) == fetched(archive, images)

    def test_answers_come_in_the_order_of_the_question_whatever_is_left_out(self, archive):
        images = planned(archive)[1::2]

        answers = fetched(archive, images)

        assert [item.plan for item in answers] == images
        assert [item.data for item in answers] == PICTURES[1::2]

    def test_more_bytes_than_allowed_is_one_verdict_and_not_an_error(self, archive):
        images = planned(archive)
        limit = sorted(map(len, PICTURES))[-2]  # all but the largest

        answers = fetched(archive, images, limit)

        late = [a.verdict.reason for a in answers if a.data is None]
        assert late == ["too_large"]
        assert [a.data for a in answers if a.data] == [p for p in PICTURES if len(p) <= limit]

    def test_an_object_that_was_written_again_is_changed_and_one_that_is_gone_vanished(
        self, archive
    ):
        images = planned(archive)
        first = archive.root / images[0].uri.removeprefix(archive.uri + "/")

        os.utime(first, ns=(1, 1))
        assert fetched(archive, images)[0].verdict.reason == "changed"

        first.unlink()
        assert fetched(archive, images)[0].verdict.reason == "vanished"

    def test_an_empty_folder_holds_nothing(self, store):
        assert planned(store) == []


class ShardContract(FormatContract):
    """For formats that hold many images in one object."""

    shard: str
    """The name that `write` gives the one shard."""

    def test_an_empty_shard_is_one_rejected_row(self, store):
        (store.root / self.shard).write_bytes(b"")

        (image,) = planned(store)

        assert image.key == self.shard
        assert image.problem.startswith("empty: ")

    def test_a_shard_without_images_yields_nothing(self, store):
        self.write(store.root, [])

        assert planned(store) == []

    def test_noise_by_a_shards_name_is_one_rejected_row(self, store):
        noise = b"".join(zlib.crc32(bytes([i])).to_bytes(4, "big") for i in range(256)) * 4
        (store.root / self.shard).write_bytes(noise)

        (image,) = planned(store, self.format_name)

        assert image.problem.partition(":")[0] in {"corrupt", "truncated"}

    def test_wherever_a_shard_is_cut_indexing_ends_and_says_so(self, archive):
        path = archive.root / self.shard
        whole = path.read_bytes()
        for size in range(1, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:size])
            for image, item in self.answered(archive):
                # What is not whole has a verdict: no image is silently shorter than it was.
                assert item is None or item.data is None or item.data in PICTURES
                assert image.problem or item is not None

    def answered(self, store):
        """Every planned image with its answer, None where planning knew better."""
        images = planned(store, self.format_name)
        answers = iter(fetched(store, images))
        return [(image, None if image.problem else next(answers)) for image in images]
