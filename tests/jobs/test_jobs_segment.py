"""`maskfleet segment` in process: exit codes, refusals, config files, and its frozen surface."""

import json
import re
import signal
from types import SimpleNamespace

import pytest

import jobs.__main__ as program
from jobs import segment
from pipeline.errors import StorageBusy
from tests.archives import filled, png, tree, uniform
from tests.archives import segment as segmented
from tests.bundles import tiny_bundle as another_bundle


@pytest.fixture
def call(tmp_path, tiny_bundle, capsys):
    """Run the command on tmp_path/in and out; answers the exit code and what was said."""

    def called(*words: str, source="in", out="out", model=tiny_bundle):
        given = [str(tmp_path / source), "--out", str(tmp_path / out), "--model", str(model)]
        return answer(capsys, lambda: segment.main([*given, *words]))

    return called


def answer(capsys, command):
    try:
        code = command()
    except SystemExit as end:  # argparse's way, and tyro's
        code = end.code
    said = capsys.readouterr()
    return SimpleNamespace(code=code, out=said.out, err=said.err, said=flat(said.out + said.err))


def flat(text: str) -> str:
    """Without tyro's frame and line breaks."""
    return " ".join(re.sub(r"[╭╮╰╯│─]", " ", text).split())


# -- how it ends ---------------------------------------------------------------------------------


def test_0_all_is_done_and_a_summary_says_so(tmp_path, call):
    uniform(tmp_path / "in", 3)

    told = call()

    assert told.code == 0
    assert told.out.splitlines()[0] == "3 masks, 0 rejected of 3 images (0 other objects skipped)"
    assert told.out.splitlines()[-1] == f"run: {tmp_path / 'out'}"
    assert (tmp_path / "out/overview.png").exists()


def test_0_a_classifier_leaves_labels(tmp_path, call, tiny_classifier):
    uniform(tmp_path / "in", 3)

    told = call(model=tiny_classifier)

    assert told.code == 0
    assert told.out.splitlines()[0] == "3 labels, 0 rejected of 3 images (0 other objects skipped)"
    assert json.loads((tmp_path / "out/receipt.json").read_text())["task"] == "classify"


def test_2_a_classifier_has_no_pixels_to_be_sure_of(tmp_path, call, tiny_classifier):
    uniform(tmp_path / "in", 1)

    told = call("--confidence", model=tiny_classifier)

    assert told.code == 2
    assert "refused: --confidence: --model" in told.err
    assert not (tmp_path / "out").exists()


def test_3_some_images_were_rejected_and_the_summary_says_why(tmp_path, call):
    filled(tmp_path / "in", {"a.png": png(20, 20, 1), "b.jpg": b"", "c.jpg": b"text", "d.txt": b""})

    told = call()

    assert told.code == 3
    assert "1 masks, 2 rejected of 3 images (1 other objects skipped)" in told.out
    assert "rejected: 1 empty" in told.out
    assert "rejected: 1 not_an_image" in told.out


def test_4_it_was_stopped_and_the_same_command_goes_on(tmp_path, call, monkeypatch):
    uniform(tmp_path / "in", 3)
    listen = segment._listen

    def stopped_at_once(stop):
        listen(stop)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(segment, "_listen", stopped_at_once)
        told = call()
    assert told.code == 4
    assert "not finished" in told.err
    assert "run the same command again" in told.err

    assert call().code == 0


def test_4_the_store_was_busy(tmp_path, call, monkeypatch):
    uniform(tmp_path / "in", 2)

    def busy(*arguments):
        raise StorageBusy("s3://bucket: SlowDown after 6 attempts")

    monkeypatch.setattr(segment, "segment_archive", busy)
    told = call()

    assert (told.code, told.err) == (4, "not finished: s3://bucket: SlowDown after 6 attempts\n")


def test_1_is_kept_for_bugs_and_shows_a_trace(tmp_path, call, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(segment, "segment_archive", broken)
    told = call()

    assert told.code == 1
    assert "a bug" in told.err
    assert "ZeroDivisionError: ours" in told.err


def test_a_second_call_does_nothing_and_ends_the_same_way(tmp_path, call):
    filled(tmp_path / "in", {"a.png": png(20, 20, 1), "b.jpg": b""})
    assert call().code == 3

    told = call()

    assert told.code == 3
    assert "this call: 0 images" in told.out


# -- refused: what, where, and the way out -------------------------------------------------------


def test_2_a_source_that_is_not_there(tmp_path, call):
    told = call(source="nowhere")

    assert told.code == 2
    assert f"refused: cannot read the source: {tmp_path}/nowhere is not a folder" in told.err
    assert not (tmp_path / "out").exists()


def test_2_an_empty_folder(tmp_path, call):
    filled(tmp_path / "in", {"labels.json": b"{}"})

    told = call()

    assert told.code == 2
    assert f"no images below {tmp_path}/in" in told.err
    assert "skipped {'.json': 1}" in told.err
    assert "--include" in told.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "out"), [("in", "in/out"), ("in/sub", "in"), ("in", "in")])
def test_2_run_and_source_inside_each_other(tmp_path, call, source, out):
    uniform(tmp_path / "in/sub", 1)

    told = call(source=source, out=out)

    assert told.code == 2
    assert "lie inside each other; choose a folder beside it" in told.err


def test_2_a_folder_of_somebody_else(tmp_path, call):
    uniform(tmp_path / "in", 1)
    filled(tmp_path / "out", {"thesis.tex": b"years of work"})

    told = call()

    assert told.code == 2
    assert "is not empty" in told.err
    assert "thesis.tex" in told.err
    assert "choose an empty folder" in told.err
    assert tree(tmp_path / "out") == {"thesis.tex"}


def test_2_a_run_of_another_model(tmp_path, call):
    uniform(tmp_path / "in", 1)
    assert call().code == 0

    told = call(model=another_bundle(tmp_path / "model", seed=7))

    assert told.code == 2
    assert "model" in told.err
    assert "choose another --out" in told.err


def test_2_a_run_of_another_config_names_the_difference(tmp_path, call):
    uniform(tmp_path / "in", 1)
    assert call("--tile.overlap", "16").code == 0

    told = call("--tile.overlap", "24")

    assert told.code == 2
    assert "tile.overlap" in told.err
    assert "16" in told.err
    assert "24" in told.err


@pytest.mark.parametrize("model", ["nowhere", "weights.pt2", "in"])
def test_2_a_model_that_is_no_bundle(tmp_path, call, model):
    uniform(tmp_path / "in", 1)
    (tmp_path / "weights.pt2").write_bytes(b"PK")

    told = call(model=tmp_path / model)

    assert told.code == 2
    assert "no bundle there" in told.err
    assert "model.json and weights.safetensors" in told.err


def test_2_a_bundle_whose_card_is_damaged(tmp_path, call):
    uniform(tmp_path / "in", 1)
    model = another_bundle(tmp_path / "model")
    (model / "model.json").write_text("{}")

    told = call(model=model)

    assert told.code == 2
    assert "--model" in told.err
    assert not (tmp_path / "out").exists()


def test_2_a_source_with_a_secret_in_it_is_not_repeated(tmp_path, capsys):
    words = ["https://me:wJalr/XUtn@host/x", "--out", str(tmp_path)]

    told = answer(capsys, lambda: segment.main(words))

    assert told.code == 2
    assert "XUtn" not in told.said


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--modle", "x"], "--model"),
        (["--tile.sizes", "5"], "--tile.size"),
        (["--dry-rum"], "--dry-run"),
        (["--exclud", "*"], "--exclude"),
    ],
)
def test_2_an_unknown_flag_names_the_nearest(call, words, near):
    told = call(*words)

    assert told.code == 2
    assert words[0] in told.said
    assert "Perhaps you meant" in told.said
    assert near in told.said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--tile.overlap", "600", "--tile.size", "1000"],
            "--tile.overlap 600 must be at most half",
        ),
        (["--retry", "vanishd"], "did you mean vanished?"),
        (["--layout", "flatt"], "'flat', 'stacked'"),
        (["--limit", "many"], "--limit"),
        (["--size", "4x4"], "--size belongs to --layout stacked"),
        (["--format", "zip"], "files, parquet, webdataset"),
    ],
)
def test_2_a_bad_value_is_named_with_the_way_out(tmp_path, call, words, said):
    uniform(tmp_path / "in", 1)

    told = call(*words)

    assert told.code == 2
    assert said in told.said
    assert not (tmp_path / "out").exists()


def test_2_nothing_at_all(capsys):
    told = answer(capsys, lambda: segment.main([]))

    assert told.code == 2
    assert "--out" in told.said


# -- config files --------------------------------------------------------------------------------


def test_a_file_gives_the_knobs_and_a_flag_wins(tmp_path, call):
    uniform(tmp_path / "in", 5)
    config = tmp_path / "config.yaml"
    config.write_text("limit: 4\ntile: {size: 128, overlap: 16}\nlog: json\n")

    told = call("--config", str(config), "--tile.overlap", "32", "--limit=2")

    assert told.code == 0
    assert json.loads(told.out)["counts"]["planned"] == 2
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (run["config"]["tile"]["size"], run["config"]["tile"]["overlap"]) == (128, 32)


def test_a_file_may_hold_source_and_out_too(tmp_path, tiny_bundle, capsys):
    uniform(tmp_path / "in", 2)
    config = tmp_path / "config.yaml"
    config.write_text(f"source: {tmp_path}/in\nout: {tmp_path}/out\nmodel: {tiny_bundle}\n")

    assert answer(capsys, lambda: segment.main([f"--config={config}"])).code == 0
    assert (
        answer(capsys, lambda: segment.main([f"--config={config}", "--out", f"{tmp_path}/2"])).code
        == 0
    )
    assert (tmp_path / "2/run.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tile: {sizes: 5}", "unknown config key 'tile.sizes'; did you mean 'tile.size'?"),
        ("format: acme.dicom", "a file cannot give it; say --format acme.dicom on the command"),
        ("modle: x", "unknown config key 'modle'; did you mean 'model'?"),
        ("tile: {size: big}", "tile.size"),
        ("- a\n- b", "must hold `name: value` lines, it holds list"),
        ("just words", "must hold `name: value` lines, it holds str"),
        ("a: [", "is not YAML"),
        ("source: !!python/object/apply:os.system ['touch /tmp/pwned']", "is not YAML"),
    ],
)
def test_2_a_file_that_is_wrong_says_where(tmp_path, call, text, said):
    (tmp_path / "config.yaml").write_text(text)

    told = call("--config", str(tmp_path / "config.yaml"))

    assert told.code == 2
    assert said in told.err


def test_2_a_file_that_is_not_there_or_not_named(tmp_path, call):
    assert "nope.yaml: No such file" in call("--config", str(tmp_path / "nope.yaml")).err
    assert "--config needs the path" in call("--config").err


# -- dry run and logs ----------------------------------------------------------------------------


def test_a_dry_run_counts_and_writes_nothing(tmp_path, call):
    filled(tmp_path / "in", {"a.png": png(20, 20, 1), "b.png": png(20, 20, 2), "c.txt": b""})
    before = tree(tmp_path)

    told = call("--dry-run", "--exclude", "b*")

    assert told.code == 0
    assert "1 images" in told.out
    assert "1 objects skipped, 1 left out; nothing was written" in told.out
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_grown_archive_says_what_has_changed(tmp_path, call):
    uniform(tmp_path / "in", 2)
    assert call().code == 0
    before = {p: (tmp_path / "out" / p).read_bytes() for p in tree(tmp_path / "out")}
    filled(tmp_path / "in", {"new.png": png(20, 20, 5), "000.png": png(20, 20, 6)})

    told = call("--dry-run")

    assert told.code == 0
    assert "2 images" in told.out
    assert "'new': 1" in told.out
    assert "'changed': 1" in told.out
    assert {p: (tmp_path / "out" / p).read_bytes() for p in tree(tmp_path / "out")} == before


def test_a_dry_run_refuses_what_a_run_would(tmp_path, call):
    uniform(tmp_path / "in", 1)
    filled(tmp_path / "out", {"foreign": b""})

    assert call("--dry-run").code == 2


def test_json_logs_are_json_and_the_receipt_is_the_last_word(tmp_path, call):
    uniform(tmp_path / "in", 3)

    told = call("--log", "json", "--interval-s", "0.01")

    lines = [json.loads(line) for line in told.err.splitlines()]
    assert len(lines) >= 2
    receipt = json.loads(told.out)
    assert receipt == json.loads((tmp_path / "out/receipt.json").read_text())
    assert set(receipt) == {
        "run_id", "finished", "model", "task", "round", "counts", "skipped", "left_out",
        "this_call", "forecast",
    }  # fmt: skip
    assert set(receipt["counts"]) == {
        "planned",
        "done",
        "rejected",
        "rejected_total",
        "fragments",
        "pixels",
    }


# -- the surface ---------------------------------------------------------------------------------

FLAGS = {
    "--out", "--model", "--architecture", "--on", "--limit", "--include", "--exclude", "--format",
    "--retry", "--allow-removals", "--no-allow-removals",
    "--dry-run", "--no-dry-run", "--layout", "--size", "--confidence", "--no-confidence",
    "--slot-bytes", "--log", "--interval-s", "--help",
    "--fragment.bytes", "--fragment.images",
    "--decode.max-bytes", "--decode.max-pixels",
    "--tile.size", "--tile.overlap", "--tile.taper",
    "--batch.pixels", "--batch.window-mb", "--batch.mix", "--batch.no-mix",
    "--inference.precision", "--inference.compile", "--inference.no-compile",
    "--compute.workers", "--compute.decode-threads", "--compute.fetch-threads", "--compute.device",
    "--compute.image-timeout-s", "--compute.image-memory-mb", "--compute.object-store-mb",
    "--compute.no-progress-s",
}  # fmt: skip


def test_the_flags_are_frozen(capsys):
    told = answer(capsys, lambda: segment.main(["--help"]))

    assert told.code == 0
    # A line that begins with a flag, inside tyro's frame or without one; not what the help quotes.
    lines = [line.strip(" │|") for line in told.out.splitlines()]
    found = {f for line in lines if line[:1] == "-" for f in re.findall(r"--[a-z][a-z.-]*", line)}
    assert found == FLAGS


def test_the_commands_are_the_files_of_the_folder(capsys, monkeypatch):
    assert set(program.names()) >= {"segment", "status", "verify"}

    monkeypatch.setattr("sys.argv", ["maskfleet", "--help"])
    told = answer(capsys, program.main)
    assert told.code == 0
    assert all(f"  {name} " in told.out for name in program.names())

    monkeypatch.setattr("sys.argv", ["maskfleet", "statsu"])
    told = answer(capsys, program.main)
    assert told.code == 2
    assert "did you mean status?" in told.err

    monkeypatch.setattr("sys.argv", ["maskfleet"])
    assert answer(capsys, program.main).code == 2


def test_the_command_and_the_library_make_the_same_run(tmp_path, call, tiny_bundle):
    from pipeline import open_run

    uniform(tmp_path / "in", 3)
    assert call().code == 0
    segmented(tmp_path / "in", tmp_path / "other", tiny_bundle)

    one, other = open_run(str(tmp_path / "out")), open_run(str(tmp_path / "other"))
    assert one.class_stats.equals(other.class_stats)
