"""Whole runs with models made elsewhere: each is one bundle, in the run folder, whoever resumes."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from jobs import segment as command
from models.parts import replay
from pipeline import open_run
from pipeline.errors import EXIT_DONE, RunRefused
from pipeline.ledger import Ledger
from pipeline.storage import open_store
from tests import guests
from tests.archives import filled, png, problems, segment, tree, uniform
from tests.bundles import InProcess
from tests.pictures import blobs

SIZES = [(40, 48), (64, 64), (33, 90), (200, 230), (40, 48), (70, 30)]


@pytest.fixture
def source(tmp_path):
    """Six pictures; one of them takes several tiles."""
    files = {f"{i}.png": png(*size, i) for i, size in enumerate(SIZES)}
    return filled(tmp_path / "in", files)


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """`acme.nets.unet` on PYTHONPATH, for this process and its children."""
    folder = tmp_path / "theirs"
    name = guests.module(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    return name


def by_hand(model, height, width, seed):
    """Labels by a plain loop's body, and whether two classes are too close to call."""
    x_HWC = (blobs(height, width, seed=seed).astype(np.float32) / 255 - 0.2) / 0.25
    with torch.inference_mode():
        logits_KHW = model(torch.from_numpy(x_HWC).permute(2, 0, 1)[None].float())[0]
    best = logits_KHW.topk(2, dim=0).values
    return logits_KHW.argmax(0).numpy(), (best[0] - best[1] < 1e-4).numpy()


def assert_runs_and_resumes(source, out, model, **knobs):
    """A run, its resume after losing a fragment, and one more call, all with the same bundle."""
    outcome = segment(source, out, model, **knobs)
    assert outcome.exit_code == EXIT_DONE
    assert outcome.counts.done == len(SIZES)
    before = {path: (out / path).read_bytes() for path in tree(out) if path.startswith("bundle/")}
    card = models.Bundle.from_json(before["bundle/model.json"])
    assert hashlib.sha256(before["bundle/model.json"]).hexdigest() == card.sha256

    run, (net, _) = (
        open_run(str(out)),
        models.load_bundle(out / "bundle", knobs.get("architecture")),
    )
    seen = set()
    for i, size in enumerate(SIZES):
        mask = run.mask(f"{i}.png")
        seen |= set(np.unique(mask).tolist())
        if max(size) <= 64:
            expected, close = by_hand(net, *size, i)
            assert np.all((mask == expected) | close)
    assert len(seen) == 3  # else equal masks would prove nothing

    masks = {i: run.mask(f"{i}.png").tobytes() for i in range(len(SIZES))}
    shutil.rmtree(out / "manifest")
    shutil.rmtree(out / "final")
    (out / "masks.zarr/mask/c/1").unlink()
    again = segment(source, out, model, **knobs)
    assert (again.exit_code, again.receipt["this_call"]["images"]) == (EXIT_DONE, 2)
    assert segment(source, out, model, **knobs).receipt["this_call"]["images"] == 0
    assert {i: open_run(str(out)).mask(f"{i}.png").tobytes() for i in masks} == masks
    assert {path: (out / path).read_bytes() for path in before} == before
    assert problems(out) == []


def test_a_checkpoint_of_transformers_runs_and_resumes(tmp_path, source):
    assert_runs_and_resumes(source, tmp_path / "out", guests.balanced_checkpoint(tmp_path / "net"))


def test_an_onnx_file_runs_and_resumes(tmp_path, source):
    model = guests.onnx_file(
        tmp_path / "net.onnx", classes=guests.NAMES, mean=guests.MEAN, std=guests.STD
    )

    assert_runs_and_resumes(source, tmp_path / "out", model)


def test_an_onnx_file_of_one_size_gets_tiles_of_it(tmp_path, source):
    model = guests.onnx_file(
        tmp_path / "net.onnx", batch=1, size=(64, 64), mean=guests.MEAN, std=guests.STD
    )

    assert_runs_and_resumes(source, tmp_path / "out", model)
    with pytest.raises(
        RunRefused, match=r"--tile.size 128 is above 64, the longest side the model"
    ):
        segment(source, tmp_path / "other", model, tile={"size": 128})
    assert tree(tmp_path / "other") == set()


def test_the_probe_keeps_to_what_the_net_reads(tmp_path):
    from pipeline.infer import Segmenter

    model = guests.onnx_file(tmp_path / "net.onnx", size=(64, 64))
    found = Segmenter(*models.foreign.bundle_at(model), "cpu").found()

    assert found.max_side == 64
    assert found.budget % 64**2 == 0


def test_a_module_outside_runs_and_resumes(tmp_path, source, acme):
    model = guests.module_bundle(tmp_path / "bundle", acme)

    assert_runs_and_resumes(source, tmp_path / "out", model, architecture=acme)


def test_a_module_outside_may_have_its_work_recorded(tmp_path, source, acme, monkeypatch):
    monkeypatch.setattr(replay, "AFTER", 1)
    recording = guests.MODULE.replace("stride,", "replays = True\n    stride,")
    shutil.rmtree(tmp_path / "theirs")
    guests.module(tmp_path / "theirs", recording)
    model = guests.module_bundle(tmp_path / "bundle", acme)

    assert_runs_and_resumes(source, tmp_path / "out", model, architecture=acme)


def test_the_child_process_of_a_careful_fragment_has_the_module_too(tmp_path, source, acme):
    model = guests.module_bundle(tmp_path / "bundle", acme)
    first = segment(source, tmp_path / "first", model, architecture=acme)

    class Careful(InProcess):
        def run(self, tasks, run_uri, stop):
            Ledger.open(open_store(run_uri)).begin_attempt(0)  # as if it had been killed at it
            yield from super().run(tasks, run_uri, stop)

    again = segment(source, tmp_path / "again", model, Careful(), architecture=acme)

    assert (first.counts.done, again.counts.done) == (6, 6)
    for i in range(len(SIZES)):
        key = f"{i}.png"
        assert np.array_equal(
            open_run(str(tmp_path / "again")).mask(key), open_run(str(tmp_path / "first")).mask(key)
        )


def test_without_the_name_a_module_outside_is_refused_and_nothing_is_spent(tmp_path, source, acme):
    model = guests.module_bundle(tmp_path / "bundle", acme)

    with pytest.raises(RunRefused, match=f"say so: --architecture {acme} on the command line"):
        segment(source, tmp_path / "out", model)
    with pytest.raises(RunRefused, match=r"the caller 'acme\.nets\.vit'"):
        segment(source, tmp_path / "out", model, architecture="acme.nets.vit")
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_module_is_gone_on_with_by_naming_it_again(tmp_path, source, acme):
    model = guests.module_bundle(tmp_path / "bundle", acme)
    segment(source, tmp_path / "out", model, architecture=acme)

    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["config"]["architecture"] == acme
    with pytest.raises(RunRefused, match="--architecture"):
        segment(source, tmp_path / "out", model)


def test_the_command_line_alone_names_a_module(tmp_path, source, acme, capsys):
    model = guests.module_bundle(tmp_path / "bundle", acme)
    given = [str(source), "--out", str(tmp_path / "out"), "--model", str(model)]
    (tmp_path / "config.yaml").write_text(f"architecture: {acme}\n")

    assert command.main([*given, "--config", str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"a file cannot give it; say --architecture {acme} on the command line" in said
    assert not (tmp_path / "out").exists()

    assert command.main([*given, "--architecture", acme]) == 0


@pytest.mark.parametrize("name", ["net.pt2", "net.pkl", "net.ts", "pytorch_model.bin"])
def test_what_would_run_code_is_refused_before_anything_is_spent(tmp_path, name):
    uniform(tmp_path / "in", 1)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / name).write_bytes(b"PK\3\4")

    for model in (tmp_path / "net", tmp_path / "net" / name):
        with pytest.raises(RunRefused, match=f"--model .*{name} is a pickle or a program"):
            segment(tmp_path / "in", tmp_path / "out", Path(model))
    assert not (tmp_path / "out").exists()
