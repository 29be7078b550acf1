"""Names in a folder that lead elsewhere, nowhere or to no file: none is followed or lost."""

import os
import socket
from pathlib import Path

import pytest

from pipeline import open_run
from pipeline.errors import EXIT_DONE, EXIT_REJECTIONS
from pipeline.keys import unescape
from tests import hostile
from tests.archives import filled, png, problems, segment, uniform
from tests.bundles import InProcess

NO_FILE = "not a regular file"


@pytest.fixture
def source(tmp_path) -> Path:
    filled(tmp_path / "outside", {"secret.png": png(20, 20, 9)})
    return filled(tmp_path / "in", {"a.png": png(20, 20, 1), "sub/b.png": png(20, 20, 2)})


def keys(out: Path) -> list[str]:
    return sorted(open_run(str(out)).images["key"].to_pylist())


def test_links_are_followed_to_files_inside_and_nowhere_else(source, tmp_path, tiny_bundle):
    links = {
        "inside.png": "sub/b.png",
        "outside.png": str(tmp_path / "outside/secret.png"),
        "up.png": "../outside/secret.png",
        "dangling.png": "nowhere.png",
        "loop.png": "loop.png",
        "folder": str(tmp_path / "outside"),
        "sub/self": "..",
    }
    for name, target in links.items():
        (source / name).symlink_to(target)

    outcome = segment(source, tmp_path / "out", tiny_bundle)

    assert outcome.exit_code == EXIT_DONE
    assert keys(tmp_path / "out") == ["a.png", "inside.png", "sub/b.png"]
    assert outcome.receipt["skipped"] == {NO_FILE: len(links) - 1}


def test_what_is_no_file_is_never_opened(source, tmp_path, tiny_bundle, monkeypatch):
    os.mkfifo(source / "pipe.png")
    monkeypatch.chdir(source)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        (source / "folder.jpg").mkdir()

        outcome = segment(source, tmp_path / "out", tiny_bundle)

    assert outcome.exit_code == EXIT_DONE
    assert outcome.receipt["skipped"] == {NO_FILE: 2}


@pytest.mark.parametrize("becomes", ["fifo", "link", "folder", "nothing"])
def test_what_was_a_file_when_it_was_planned_and_is_none_now_is_rejected(
    source, tmp_path, tiny_bundle, becomes
):
    path = source / "sub/b.png"

    class Meddling(InProcess):
        def run(self, tasks, run_uri, stop):
            path.unlink()
            if becomes == "fifo":
                os.mkfifo(path)
            elif becomes == "link":
                path.symlink_to(path)
            elif becomes == "folder":
                path.mkdir()
            yield from super().run(tasks, run_uri, stop)

    outcome = segment(source, tmp_path / "out", tiny_bundle, Meddling())

    assert outcome.exit_code == EXIT_REJECTIONS
    (row,) = open_run(str(tmp_path / "out")).rejected.to_pylist()
    assert (row["key"], row["station"], row["reason"]) == ("sub/b.png", "fetch", "vanished")
    assert problems(tmp_path / "out") == []


def test_every_name_a_file_can_have_is_given_back(tmp_path, tiny_bundle):
    pictures = {os.fsdecode(name): content for name, (content, _) in hostile.names().items()}
    filled(tmp_path / "in", pictures)

    assert segment(tmp_path / "in", tmp_path / "out", tiny_bundle).exit_code == EXIT_DONE

    run = open_run(str(tmp_path / "out"))
    images = run.images.to_pylist()
    assert {unescape(row["key"]) for row in images} == pictures.keys()
    assert all(run.mask(row["key"]).shape == (16, 16) for row in images)
    assert problems(tmp_path / "out") == []


def test_a_name_of_control_characters_never_reaches_a_log(tmp_path, tiny_bundle, capfd):
    name = "\x1b[2Jnew\nline\u202e.png"
    filled(tmp_path / "in", {name: b"no picture", "a.png": png(20, 20, 1)})

    outcome = segment(tmp_path / "in", tmp_path / "out", tiny_bundle)

    assert outcome.exit_code == EXIT_REJECTIONS
    said = "".join(capfd.readouterr())
    assert all(character.isprintable() or character in "\n\r\t" for character in said)


def test_a_source_that_cannot_be_entered_is_named(tmp_path, tiny_bundle):
    if os.geteuid() == 0:
        pytest.skip("root enters every folder")
    source = uniform(tmp_path / "in", 2)
    (source / "closed").mkdir(mode=0)

    with pytest.raises(Exception, match="closed"):
        segment(source, tmp_path / "out", tiny_bundle)
