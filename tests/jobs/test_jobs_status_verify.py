"""`maskfleet status` and `maskfleet verify` in process: exit codes, words, frozen JSON."""

import json
import threading

import pytest

from jobs import status, verify
from pipeline.errors import RunUnfinished
from tests.archives import copied, filled, png, segment, uniform
from tests.bundles import InProcess


class Half(InProcess):
    """Stops after the first fragment."""

    def run(self, tasks, run_uri, stop):
        for receipt in super().run(tasks, run_uri, stop):
            yield receipt
            stop.set()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_bundle):
    """Three runs: done, with rejections, and half done."""
    folder = tmp_path_factory.mktemp("runs")
    source = uniform(folder / "in", 10)
    segment(source, folder / "done", tiny_bundle)
    with pytest.raises(RunUnfinished):
        segment(source, folder / "half", tiny_bundle, Half(), threading.Event())
    filled(source, {"bad.jpg": b"", "zz.png": png(20, 20, 1)})
    segment(source, folder / "rejections", tiny_bundle)
    return folder


@pytest.mark.parametrize(("run", "code"), [("done", 0), ("rejections", 3), ("half", 4)])
def test_status_ends_like_the_run(runs, run, code, capsys):
    assert status.main([str(runs / run)]) == code

    said = capsys.readouterr().out
    if run == "rejections":
        assert "11 done, 1 rejected, 0 pending of 12 images" in said
        assert "rejected: 1 empty" in said
    if run == "half":
        assert "pending of 10 images" in said
        assert "not finished" in said


def test_the_json_of_status_has_frozen_keys(runs, capsys):
    assert status.main([str(runs / "rejections"), "--json"]) == 3

    told = json.loads(capsys.readouterr().out)
    assert set(told) == {
        "run", "model", "rounds", "planned", "done", "rejected", "pending", "fragments",
        "committed", "megapixels", "per_second", "eta_s", "last_commit_s_ago", "finished",
    }  # fmt: skip
    assert told["planned"] == told["done"] + sum(told["rejected"].values()) + told["pending"] == 12
    assert told["finished"] is True


def test_status_counts_add_up_while_a_run_is_half_done(runs, capsys):
    status.main([str(runs / "half"), "--json"])

    told = json.loads(capsys.readouterr().out)
    assert told["done"] + told["pending"] == told["planned"] == 10
    assert 0 < told["committed"] < told["fragments"] == 3
    assert told["finished"] is False


@pytest.mark.parametrize(("run", "code"), [("done", 0), ("rejections", 0), ("half", 4)])
def test_verify_ends_with_0_only_if_nothing_is_wrong_or_pending(runs, run, code, capsys):
    assert verify.main([str(runs / run)]) == code

    said = capsys.readouterr().out
    assert ("all is as the run says" in said) or run == "half"
    assert ("pending" in said) == (run == "half")


def test_verify_names_what_is_wrong(runs, tmp_path, capsys):
    run = copied(runs / "done", tmp_path / "run")
    path = run / "masks.zarr/mask/c/1"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(bytes(data))

    assert verify.main([str(run)]) == 4
    said = capsys.readouterr().out
    assert said.startswith("WRONG  masks.zarr/mask/c/1")
    assert "delete it and run segment again" in said

    assert verify.main([str(run), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"problems", "pending", "objects", "images", "pixels", "debris"}
    assert len(told["problems"]) == 1


def test_status_of_a_damaged_fragment_names_it(runs, tmp_path, capsys):
    run = copied(runs / "done", tmp_path / "run")
    path = run / "masks.zarr/mask/c/1"
    path.write_bytes(b"\0" + path.read_bytes()[1:])

    assert status.main([str(run)]) == 2
    assert "masks.zarr/mask/c/1" in capsys.readouterr().err


@pytest.mark.parametrize("command", [status, verify])
def test_a_folder_without_a_run_is_refused_with_the_way_out(tmp_path, command, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert command.main([str(folder)]) == 2
        said = capsys.readouterr().err
        assert f"{folder} holds no run" in said
        assert "maskfleet segment" in said


@pytest.mark.parametrize("command", [status, verify])
def test_an_unknown_flag_is_refused(tmp_path, command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([str(tmp_path), "--jsn"])

    assert end.value.code == 2
    assert "--json" in capsys.readouterr().err
