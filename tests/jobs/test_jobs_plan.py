"""`maskfleet plan`: what a run would cost, and how true that was."""

import json
import struct

import pytest

from jobs import plan
from tests.archives import segment, uniform

pytestmark = pytest.mark.usefixtures("quick_probe")


@pytest.fixture
def quick_probe(monkeypatch):
    """A pixel budget is looked for with pictures as small as ours."""
    monkeypatch.setattr("pipeline.infer.PROBE_SIDE", 32)


@pytest.fixture
def call(tmp_path, tiny_bundle, capsys):
    def called(*words: str) -> tuple[int, str, str]:
        given = [str(tmp_path / "in"), "--model", str(tiny_bundle), "--compute.workers", "1"]
        code = plan.main([*given, *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return called


def test_it_says_time_bytes_and_cost_with_intervals_and_writes_nothing(tmp_path, call):
    uniform(tmp_path / "in", 9)
    before = sorted(tmp_path.rglob("*"))

    code, out, _ = call("--price-per-hour", "3600", "--json")

    said = json.loads(out)
    assert code == 0
    assert said["images"] == 9
    assert said["seconds"]["low"] < said["seconds"]["expected"] < said["seconds"]["high"]
    assert said["cost"]["expected"] == pytest.approx(said["seconds"]["expected"] + said["start_s"])
    assert said["bytes_read"] == sum(p.stat().st_size for p in (tmp_path / "in").rglob("*.png"))
    assert said["bytes_written"]["expected"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_people_read_a_few_lines(tmp_path, call):
    uniform(tmp_path / "in", 9)

    code, out, _ = call()

    assert code == 0
    assert out.startswith("9 images, ")
    assert "80 % intervals, from 9 pictures" in out
    assert "costs" not in out


def test_a_header_that_promises_what_no_run_would_read_does_not_count(tmp_path, call):
    uniform(tmp_path / "in", 200)
    liar = struct.pack(">8sI4sIIB", b"\x89PNG\r\n\x1a\n", 13, b"IHDR", 60_000, 60_000, 8)
    (tmp_path / "in/liar.png").write_bytes(liar + bytes(400))

    _, out, _ = call("--json", "--sample", "16")

    megapixels = json.loads(out)["megapixels"]
    assert megapixels["expected"] == pytest.approx(200 * 40 * 48 / 1e6, rel=0.02)


def test_pictures_that_cannot_be_read_are_foreseen(tmp_path, call):
    for path in sorted(uniform(tmp_path / "in", 8).rglob("*.png"))[:4]:
        path.write_bytes(path.read_bytes()[:200])

    _, out, _ = call("--json")

    assert json.loads(out)["rejected"] == pytest.approx(4)


def test_the_receipt_of_the_run_says_how_true_the_forecast_was(tmp_path, call, tiny_bundle):
    source, out = uniform(tmp_path / "in", 9), tmp_path / "out"
    assert call("--out", str(out))[0] == 0

    told = segment(source, out, tiny_bundle).receipt["forecast"]

    forecast = json.loads((out / "forecast.json").read_text())
    assert told["seconds"] == forecast["seconds"]
    assert told["actual_seconds"] > 0
    assert told["within"] == (
        forecast["seconds"]["low"] <= told["actual_seconds"] <= forecast["seconds"]["high"]
    )
    again = segment(source, out, tiny_bundle).receipt
    assert again["forecast"] is None  # nothing was left to do


def test_a_folder_that_holds_a_run_is_refused(tmp_path, call, tiny_bundle):
    source, out = uniform(tmp_path / "in", 3), tmp_path / "out"
    segment(source, out, tiny_bundle)

    code, _, err = call("--out", str(out))

    assert code == 2
    assert "maskfleet status" in err


def test_an_empty_source_is_refused(tmp_path, call):
    (tmp_path / "in").mkdir()
    assert call()[0] == 2
