"""`maskfleet train` in process: what it leaves, what it goes on from, what it refuses."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import segment as segmenting
from jobs import train as training
from models import Bundle
from pipeline.checkpoints import Checkpoints
from pipeline.registry import Registry
from pipeline.storage import LocalStore
from pipeline.train import train
from tests import archives, learning
from tests.archives import filled, tree
from tests.bundles import tiny_bundle as bundle_of
from tests.pictures import blobs, encoded

PICTURES = 12
ONCE = ("--set", "length=1", "--set", "rate.warmup=0")
NAMES = ("--name", "blobs")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return learning.folder(tmp_path_factory.mktemp("labels") / "data", PICTURES)


def words(data, registry, *more) -> list[str]:
    """A command line; what comes later counts."""
    given = (data, "--out", registry, *NAMES, *learning.WORDS, *more)
    return [str(word) for word in given]


def trained(*arguments):
    """`maskfleet train` without the command."""
    return train(training.parsed(words(*arguments)))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A training that nothing happened to."""
    return trained(data, tmp_path_factory.mktemp("undisturbed") / "registry")


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A registry with that training, to damage; its folder is `copy / TRAINING`."""
    shutil.copytree(undisturbed.version.registry, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def call(capsys):
    """Run a command; answers the exit code and what was said."""

    def called(*given, command=training):
        try:
            code = command.main([str(word) for word in given])
        except SystemExit as end:  # tyro's way
            code = end.code
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return called


def of_training(version, name: str) -> Path:
    """An object of the training that a version came of."""
    return Path(version.registry) / "trainings" / version.training / name


def rows(version, name: str) -> list[dict]:
    return pq.read_table(of_training(version, name)).to_pylist()


def weights(version) -> bytes:
    return (Path(version.uri) / "weights.safetensors").read_bytes()


def calls(version) -> set[str]:
    """Folders of the calls that trained."""
    return {path.name for path in of_training(version, "").glob("call-*")}


def said_of(version) -> dict:
    """training.json."""
    return json.loads(of_training(version, "training.json").read_text())


def assert_the_same(version, undisturbed) -> None:
    """Bit for bit, and every step once."""
    assert version.sha256 == undisturbed.version.sha256
    assert weights(version) == weights(undisturbed.version)
    untimed = [
        [{**row, "seconds": 0} for row in rows(one, "history.parquet")]
        for one in (version, undisturbed.version)
    ]
    assert untimed[0] == untimed[1]
    assert [row["step"] for row in untimed[0]] == list(range(1, learning.STEPS + 1))


# -- what it leaves ------------------------------------------------------------------------------


def test_a_version_is_published_with_its_figures_and_is_the_candidate(undisturbed, data):
    version = undisturbed.version
    registry = Registry.open(LocalStore(Path(version.registry)))

    assert undisturbed.fresh
    assert version.path == "blobs/v0001"
    assert registry.meant("candidate") == version
    assert set(registry.aliases()) == {"candidate"}
    assert version.parent is None
    assert version.recipe["length"] == learning.STEPS
    assert version.data_sha256 == said_of(version)["data_sha256"]
    figures = version.metrics
    assert set(figures) == {"miou", "pixel_accuracy", "iou", "pictures", "steps", "seconds"}
    assert set(figures["iou"]) == {"background", "nucleus"}
    assert 0 < figures["miou"] < 1
    assert figures["steps"] == learning.STEPS
    assert figures["seconds"] > 0
    card = Bundle.from_json((Path(version.uri) / "model.json").read_bytes())
    assert [entry.name for entry in card.classes] == ["background", "nucleus"]
    assert card.provenance["training"] == version.training
    assert card.input.mean == tuple(version.recipe["mean"])


def test_what_led_to_it_is_left_to_look_at(undisturbed):
    version = undisturbed.version
    folder = of_training(version, "")

    assert undisturbed.folder == str(folder)
    made = {path for path in tree(folder) if not path.startswith(("call-", "history/"))}
    assert made == {
        "training.json", "data.parquet", "progress.json", "result.json",
        "history.parquet", "rejected.parquet", "curves.png", "sheet.png",
        "evaluation/evaluation.parquet", "evaluation/rejected.parquet", "evaluation/figures.json",
        "bundle/model.json", "bundle/weights.safetensors",
    }  # fmt: skip
    for name in ("curves.png", "sheet.png"):
        with Image.open(folder / name) as image:
            image.load()
    figures = json.loads((folder / "evaluation/figures.json").read_text())
    assert figures["miou"] == version.metrics["miou"]
    assert rows(version, "rejected.parquet") == []
    assert json.loads((folder / "result.json").read_text()) == {"version": "blobs/v0001"}


def test_every_step_is_in_the_history_and_every_look(undisturbed):
    found = rows(undisturbed.version, "history.parquet")

    assert [row["step"] for row in found] == list(range(1, 13))
    assert [row["step"] for row in found if row["miou"] is not None] == [4, 8, 12]
    assert all(row["loss"] > 0 and row["gradient_norm"] > 0 for row in found)
    assert found[0]["learning_rate"] == pytest.approx(0.5e-3)
    assert [row["seconds"] for row in found] == sorted(row["seconds"] for row in found)


def test_every_picture_is_in_the_table_of_data_with_what_it_was_used_for(undisturbed):
    version = undisturbed.version
    found = rows(version, "data.parquet")
    about = said_of(version)["about"]

    assert sorted(row["key"] for row in found) == [f"{n:04}.png" for n in range(PICTURES)]
    roles = [row["role"] for row in found]
    assert (roles.count("learnt"), roles.count("held out")) == (about["learnt"], about["held_out"])
    assert about["learnt"] + about["held_out"] == PICTURES
    assert version.metrics["pictures"] == about["held_out"] > 0
    assert len({row["sha256"] for row in found}) == PICTURES
    held_out = {row["key"] for row in found if row["role"] == "held out"}
    assert {row["key"] for row in rows(version, "evaluation/evaluation.parquet")} == held_out


def test_the_same_command_again_does_nothing_and_says_the_version(undisturbed, data, copy, call):
    version, before = undisturbed.version, tree(copy)

    told = call(*words(data, copy))

    assert told.code == 0
    lines = told.out.splitlines()
    assert lines[0].startswith(f"blobs/v0001 ({version.sha256[:12]}), 12 steps: mIoU ")
    assert lines[1].startswith("made before; nothing was done. See ")
    assert lines[3].endswith(f"maskfleet promote candidate@{copy}")
    assert tree(copy) == before


def test_a_run_can_be_made_with_what_was_trained(undisturbed, data, tmp_path, call):
    reference = undisturbed.version.reference

    told = call(
        data / "images", "--out", tmp_path / "run", "--model", reference, command=segmenting
    )

    assert told.code == 0
    assert told.out.startswith(f"{PICTURES} masks, 0 rejected")
    about = json.loads((tmp_path / "run/run.json").read_text())["bundle"]
    assert (about["name"], about["sha256"]) == (reference, undisturbed.version.sha256)


def test_progress_is_told_in_lines_of_json(data, tmp_path, call):
    told = call(*words(data, tmp_path / "r", "--log", "json", "--interval-s", "0.01"))

    lines = [json.loads(line) for line in told.err.splitlines() if line.startswith("{")]
    steps = [line["step"] for line in lines if "step" in line]
    assert told.code == 0
    assert steps
    assert steps == sorted(set(steps))
    assert {line["of"] for line in lines if "step" in line} == {learning.STEPS}


def test_gray_models_learn_from_coloured_pictures_and_cards_say_what_they_read(data, tmp_path):
    gray = ("--set", "model.channels=1", "--set", "mean=[0.2]", "--set", "std=[0.25]")

    version = trained(data, tmp_path / "r", *ONCE, *gray).version

    card = Bundle.from_json((Path(version.uri) / "model.json").read_bytes())
    assert (card.input.channels, card.input.mean, card.input.std) == (1, (0.2,), (0.25,))


def test_epochs_and_class_weights_are_counted_from_the_labels(data, tmp_path):
    balanced = ("--set", "loss.class_weights=median_frequency")

    version = trained(data, tmp_path / "r", *ONCE, "--set", "unit=epochs", *balanced).version

    learnt = said_of(version)["about"]["learnt"]
    assert version.metrics["steps"] == -(-learnt // 4)
    rare, common = sorted(version.recipe["loss"]["class_weights"], reverse=True)
    assert rare > 1 > common


def test_a_training_that_no_longer_gets_better_ends_and_stays_ended(data, tmp_path):
    still = ("--set", "rate.peak=1e-12", "--set", "frozen_statistics=true")
    impatient = (*still, "--set", "patience=1")

    first = trained(data, tmp_path / "r", *impatient)
    again = trained(data, tmp_path / "r", *impatient)

    assert first.version.metrics["steps"] == 8  # the look at 4 was the best, that at 8 no better
    assert len(rows(first.version, "history.parquet")) == 8
    assert (again.fresh, again.version) == (False, first.version)


# -- what it goes on from ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ending", ["history/000000005-000000008.json", "000000008/state.json", "bundle/model.json"]
)
def test_a_killed_training_ends_in_the_weights_of_an_undisturbed_one(
    ending, undisturbed, data, tmp_path
):
    registry = tmp_path / "r"
    learning.killed(training.main, words(data, registry), "replace", ending)
    assert not list(registry.glob("trainings/*/result.json"))

    found = trained(data, registry)

    assert found.fresh
    assert_the_same(found.version, undisturbed)
    assert len(calls(found.version)) == (1 if ending.startswith("bundle") else 2)


def test_a_damaged_newest_checkpoint_costs_a_few_steps_and_nothing_else(
    undisturbed, data, copy, caplog
):
    unfinished(copy)
    (newest,) = copy.glob("trainings/*/call-*/000000012/state.safetensors")
    newest.write_bytes(newest.read_bytes()[:-100])

    found = trained(data, copy)

    assert f"the checkpoint {newest.parent} is passed over" in caplog.text
    assert found.fresh
    assert len(calls(found.version)) == 2
    assert_the_same(found.version, undisturbed)


def unfinished(registry: Path, *keep: str) -> None:
    """As if a training had been killed before it published anything."""
    for name in {"blobs", "aliases"} - set(keep):
        shutil.rmtree(registry / name)
    for path in registry.glob("trainings/*/result.json"):
        path.unlink()


@pytest.mark.parametrize("there", [(), ("blobs",), ("blobs", "aliases")])
def test_a_publication_that_was_cut_off_is_finished_and_is_one(undisturbed, data, copy, there):
    unfinished(copy, *there)

    found = trained(data, copy)

    registry = Registry.open(LocalStore(copy))
    assert found.version.sha256 == undisturbed.version.sha256
    assert [version.path for version in registry.versions()] == ["blobs/v0001"]
    assert [entry.version for entry in registry.history("candidate")] == ["blobs/v0001"]
    assert calls(found.version) == calls(undisturbed.version), "it trained again"


def test_another_training_never_goes_on_with_this_one(undisturbed, data, copy):
    other = trained(data, copy, *ONCE)
    third = trained(data, copy, *ONCE, "--set", "seed=1")

    versions = [undisturbed.version, other.version, third.version]
    assert [version.path for version in versions] == [f"blobs/v000{n}" for n in (1, 2, 3)]
    assert len({version.training for version in versions}) == 3
    assert len({version.sha256 for version in versions}) == 3
    assert len(list((copy / "trainings").iterdir())) == 3


def test_an_id_that_is_another_training_is_refused_naming_what_differs(
    data, tmp_path, call, tiny_bundle
):
    registry, mine = tmp_path / "r", (*ONCE, "--run", "mine")
    assert trained(data, registry, *mine).version.training == "mine"
    more = learning.folder(tmp_path / "more", PICTURES + 1)

    for changed, differs in (
        (words(more, registry, *mine), "data_sha256"),
        (words(data, registry, *mine, "--set", "seed=5"), "recipe"),
        (words(data, registry, *mine, "--name", "other"), "name"),
        (words(data, registry, *mine, "--model", tiny_bundle), "parent"),
    ):
        told = call(*changed)
        assert told.code == 2
        assert "trainings/mine is another training (" in told.err
        assert differs in told.err
        assert "choose another --run" in told.err


def test_a_loss_that_is_no_number_ends_it_with_a_sentence_and_the_last_good_state(
    data, tmp_path, call
):
    diverging = ("--set", "rate.peak=1e3", "--set", "rate.warmup=12", "--every", "1")

    told = call(*words(data, tmp_path / "r", *diverging, "--interval-s", "600"))

    assert told.code == 2
    assert told.err.startswith("refused: step ")
    for said in ("learning rate", "Try a lower learning rate", "; that state is "):
        assert said in told.err
    folder = Path(told.err.strip().rpartition("; that state is ")[2])
    assert {path.name for path in folder.iterdir()} == {"state.json", "state.safetensors"}
    done = int(folder.name)
    state = Checkpoints(str(folder.parents[1]), "x").newest(at_most=done)
    assert state.done == done
    assert all(value.isfinite().all() for value in state.model.values())
    assert not (tmp_path / "r" / "blobs").exists()

    again = call(*words(data, tmp_path / "r", *diverging))
    assert again.code == 2
    assert folder.exists()


def test_a_bundle_is_gone_on_from_with_its_own_eyes(undisturbed, data, tmp_path):
    parent = undisturbed.version
    still = ("--set", "rate.peak=1e-12", "--set", "mean=[0.5,0.5,0.5]")

    found = trained(data, tmp_path / "r", "--model", parent.uri, *ONCE, *still).version

    said = said_of(found)
    assert said["parent"] == parent.sha256
    assert said["about"]["parent_bundle"] == parent.uri
    assert found.parent is None  # it is in no registry of ours
    assert found.metrics["iou"] == pytest.approx(parent.metrics["iou"])
    assert found.recipe["mean"] == parent.recipe["mean"]


def test_a_version_is_gone_on_from_and_is_the_parent(undisturbed, data, copy):
    registry = Registry.open(LocalStore(copy))
    registry.move("champion", registry.version("blobs", 1), None, "the first")

    found = trained(data, copy, "--model", f"champion@{copy}", *ONCE).version

    assert found.path == "blobs/v0002"
    assert found.parent == "blobs/v0001"
    assert said_of(found)["parent"] == undisturbed.version.sha256
    assert said_of(found)["about"]["parent_version"] == "blobs/v0001"
    assert registry.meant("candidate") == found
    assert registry.meant("champion").path == "blobs/v0001"


# -- what it learns from -------------------------------------------------------------------------


def test_a_corrupted_picture_is_written_down_and_stops_nothing(data, tmp_path):
    harmed = shutil.copytree(data, tmp_path / "data")
    for name in ("0003.png", "0005.png"):
        picture = harmed / "images" / name
        picture.write_bytes(picture.read_bytes()[:300])
    held_out = ("--held-out", "0000.png", "--held-out", "0005.png")

    version = trained(harmed, tmp_path / "r", "--set", "length=3", *held_out).version

    (learnt,) = rows(version, "rejected.parquet")
    assert set(learnt) == {"key", "station", "reason", "detail"}
    assert (learnt["key"], learnt["station"], learnt["reason"]) == (
        "0003.png", "decode", "truncated",
    )  # fmt: skip
    (looked_at,) = rows(version, "evaluation/rejected.parquet")
    assert looked_at["key"] == "0005.png"
    assert version.metrics["pictures"] == 1


def test_pictures_that_are_all_broken_teach_nothing_and_are_all_named(data, tmp_path):
    harmed = shutil.copytree(data, tmp_path / "data")
    for picture in sorted((harmed / "images").iterdir())[1:]:
        picture.write_bytes(picture.read_bytes()[:300])

    version = trained(harmed, tmp_path / "r", "--set", "length=3", "--held-out", "0000.png").version

    assert len(rows(version, "rejected.parquet")) == PICTURES - 1
    assert {row["loss"] for row in rows(version, "history.parquet")} == {0.0}


def test_held_out_pictures_are_a_split_or_globs_and_never_learnt_from(data, tmp_path):
    named = shutil.copytree(data, tmp_path / "data")
    keys = [f"{n:04}" for n in range(PICTURES)]
    lists = {"train": keys[:8], "later": keys[8:]}
    (named / "dataset.json").write_text(json.dumps({"splits": lists}))

    for held_out, expected in ((["later"], {8, 9, 10, 11}), (["0001*", "*2.png"], {1, 2})):
        flags = [word for name in held_out for word in ("--held-out", name)]
        found = rows(trained(named, tmp_path / "r", *ONCE, *flags).version, "data.parquet")
        roles = {row["key"]: row["role"] for row in found}
        assert {key for key, role in roles.items() if role == "held out"} == {
            f"{n:04}.png" for n in expected
        }
        learnt = {int(key[:4]) for key, role in roles.items() if role == "learnt"}
        assert learnt == set(range(8)) - expected


def test_the_corrected_masks_of_a_run_are_learnt_from(data, tmp_path, tiny_bundle):
    archives.segment(data / "images", tmp_path / "run", tiny_bundle)
    corrected = tmp_path / "corrected"
    for mask in sorted((data / "masks").iterdir())[:6]:
        filled(corrected, {f"{mask.name}.png": mask.read_bytes()})

    source = f"run://{tmp_path / 'run'}?masks={corrected}"
    version = trained(source, tmp_path / "r", *ONCE).version

    found = rows(version, "data.parquet")
    assert [row["key"] for row in found] == [f"{n:04}.png" for n in range(6)]
    assert said_of(version)["about"]["data"] == source


# -- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model", "latent_atention"), "did you mean 'latent_attention'?"),
        (("--model", "unet"), "no architecture; did you mean 'segnet'? known: depict, lat"),
        (("--model", "latent_attention:plus"), "variants seed, plus xs, plus s"),
        (("--model", "vit_classifier", "--set", "model.width=16", "--set", "model.depth=1",
          "--set", "model.heads=2"), "vit_classifier is a classifier, and"),
        (("--model", "demo@nowhere"), "holds no registry"),
        (("--set", "model.depht=3"), "has no option 'depht'"),
        (("--set", "rate.peek=1"), "no option 'rate.peek'; did you mean 'peak'?"),
        (("--set", "lenght=1"), "no option 'lenght'; did you mean 'length'?"),
        (("--set", "length"), "--set length: write KEY=VALUE, as rate.peak=1e-3"),
        (("--set", "length=many"), "length should be a valid integer, it is 'many'"),
        (("--set", "augment.size=[32,32"), "[32,32: cannot be understood; write KEY=VALUE"),
        (("--set", "rate=1", "--set", "rate.peak=2"), "--set rate.peak=2: cannot be understood"),
        (("--set", "model.channels=1"), "mean and std of the recipe are 3 numbers, the model"),
        (("--set", "loss.class_weights=[1,2,3]"), "loss.class_weights are 3 numbers for 2 classes"),
        (("--architecture", "a.b", "--model", "a.b:xs"), "a.b has the variants none"),
        (("--recipe", "sweet"), "--recipe sweet is none of default, street, synthetic, pets"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml is not there"),
        (("--workers", "3"), "batch of 4 cannot be shared in 3 equal parts by 3 to 3 workers; try"),
        (("--workers", "4", "--least-workers", "3"), "try --set batch=12"),
        (("--workers", "1", "--least-workers", "2"), "--least-workers 2 exceeds --workers 1"),
        (("--held-out", "zebra*"), "--held-out zebra*: no split (all) and no key matches it"),
        (("--held-out", "*"), "0 pictures to learn from and 12 held out; both need some"),
        (("--split", "val"), "has no split 'val'; it has: all (12)"),
        (("--name", "../x"), "'../x' cannot be the name of a model"),
        (("--run", "A"), "'A' cannot be the id of a training"),
        (("--mlflow", "http://x"), "--mlflow needs the mlflow package: pip install mlflow"),
        (("--tensorboard", "t"), "--tensorboard needs the tensorboard package: pip install"),
    ],
)  # fmt: skip
def test_2_what_cannot_be_done_is_refused_before_anything_is_written(
    data, tmp_path, call, monkeypatch, more, said
):
    for package in ("torch.utils.tensorboard", "mlflow"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed

    told = call(*words(data, tmp_path / "r", *more))

    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert told.err.startswith("refused: ")
    assert said in told.err
    assert not (tmp_path / "r").exists()


def test_2_a_model_of_other_classes_is_refused_with_both_sides(data, tmp_path, call):
    three = bundle_of(tmp_path / "three", ids=(0, 1, 2))

    told = call(*words(data, tmp_path / "r", "--model", three))

    assert told.code == 2
    assert "knows background, debris, nucleus; the labels have background, nucleus" in told.err
    assert "give --ontology with the model's names" in told.err
    assert not (tmp_path / "r").exists()


def test_2_a_bundle_stays_what_it_is(data, tmp_path, call, tiny_bundle):
    for model, more, said in (
        (tiny_bundle, ("--set", "model.size=s"), "--set model.… builds another model"),
        (tmp_path / "nowhere", (), "no bundle there"),
    ):
        told = call(*words(data, tmp_path / "r", "--model", model, *more))
        assert told.code == 2
        assert said in told.err
    assert not (tmp_path / "r").exists()


def test_2_one_picture_is_not_enough(tmp_path, call):
    told = call(*words(learning.folder(tmp_path / "data", 1), tmp_path / "r"))

    assert told.code == 2
    assert "0 pictures to learn from and 1 held out; both need some: label more" in told.err


def test_2_wrong_masks_are_refused_before_a_model_is_built(tmp_path, call):
    labels = learning.folder(tmp_path / "data", 3)
    (labels / "masks/0001.png").write_bytes(encoded(np.full((40, 48), 7, np.uint8), "PNG"))
    (labels / "masks/0002.png").write_bytes(encoded(blobs(9, 9, 1)[..., 0] * 0, "PNG"))

    told = call(*words(labels, tmp_path / "r", "--model", "nonsense"))

    assert told.code == 2
    assert "masks with values that are no class (1): 0001.png holds 7" in told.err
    assert "masks of another size than their picture (1): 0002.png" in told.err


def test_2_a_folder_of_something_else_is_no_registry(data, tmp_path, call):
    filled(tmp_path / "r", {"thesis.txt": b"mine"})

    told = call(*words(data, tmp_path / "r"))

    assert told.code == 2
    assert "is not empty and holds no registry.json (it has thesis.txt)" in told.err
    assert tree(tmp_path / "r") == {"thesis.txt"}
