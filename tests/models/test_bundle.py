"""Bundles: what goes in comes out, byte for byte; what is not one is refused with a reason."""

import hashlib
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors import torch as tensors

import models

TINY = {"variant": "plus", "size": "xs"}


@pytest.fixture
def model():
    torch.manual_seed(3)
    return models.build("latent_attention", **TINY).eval()


def card_of(model, **changes):
    card = models.Bundle(
        architecture="latent_attention",
        config=model.config.to_json(),
        classes=(
            models.ClassInfo(0, "ground", (0, 0, 0)),
            models.ClassInfo(7, "Kern ä", (255, 170, 0)),
        ),
        input=models.InputInfo(3, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), range=(0, 4095)),
        stride=4,
        receptive_field=None,
        tile=models.TileInfo(512, 64),
        provenance={"script": "a test", "seed": 3},
        metrics={"miou": 81.25},
    )
    return replace(card, **changes)


@pytest.fixture
def saved(tmp_path, model):
    models.save_bundle(tmp_path, model, card_of(model))
    return tmp_path


def edited(folder, edit):
    """The two files after `edit` had its way with the card."""
    card = json.loads((folder / "model.json").read_text())
    edit(card)
    return json.dumps(card).encode(), (folder / "weights.safetensors").read_bytes()


def test_a_saved_model_answers_the_same_to_the_bit(saved, model):
    loaded, bundle = models.load_bundle(saved)
    x_BCHW = torch.randn(2, 3, 20, 24)

    assert not loaded.training
    assert torch.equal(loaded(x_BCHW), model(x_BCHW))
    assert replace(bundle, weights_sha256="") == card_of(model)


def test_bytes_are_loaded_like_a_folder(saved):
    card, weights = edited(saved, lambda card: None)

    _, from_bytes = models.load_bundle_bytes(card, weights)
    _, from_folder = models.load_bundle(saved)

    assert from_bytes == from_folder
    assert from_bytes.sha256 == from_folder.sha256  # white space in the card is no part of it


def test_equal_models_give_equal_bytes(tmp_path, model):
    first = models.save_bundle(tmp_path / "a", model, card_of(model))
    again, bundle = models.load_bundle(tmp_path / "a")
    second = models.save_bundle(tmp_path / "b", again, bundle)

    assert first == second
    for name in ("model.json", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_name_of_a_bundle_is_the_hash_of_its_card(tmp_path, model):
    name = models.save_bundle(tmp_path, model, card_of(model))
    card = (tmp_path / "model.json").read_bytes()
    weights = (tmp_path / "weights.safetensors").read_bytes()

    assert name == hashlib.sha256(card).hexdigest()
    assert json.loads(card)["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_another_weight_or_word_gives_another_name(tmp_path, model):
    names = [models.save_bundle(tmp_path, model, card_of(model))]
    names.append(models.save_bundle(tmp_path, model, card_of(model, metrics={"miou": 81.26})))
    with torch.no_grad():
        model.encoder.stem.norm.bias[0] += 1e-3
    names.append(models.save_bundle(tmp_path, model, card_of(model)))

    assert len(set(names)) == 3


def test_the_keys_of_a_card_are_these(saved):
    card = json.loads((saved / "model.json").read_text())

    assert set(card) == {
        *("format_version", "architecture", "config", "classes", "ignore_id", "input", "tile"),
        *("stride", "receptive_field", "provenance", "metrics", "weights_sha256"),
    }
    assert card["format_version"] == 1
    assert card["classes"][1] == {"id": 7, "name": "Kern ä", "color": [255, 170, 0]}
    assert card["input"] == {
        "channels": 3,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
        "range": [0, 4095],
    }
    assert card["tile"] == {"size": 512, "overlap": 64}


def test_loading_leaves_the_random_numbers_alone(saved):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    models.load_bundle(saved)

    assert torch.equal(torch.rand(3), expected)


def test_damaged_weights_are_refused(saved):
    card, weights = edited(saved, lambda card: None)

    with pytest.raises(ValueError, match="the files are damaged or not of one bundle"):
        models.load_bundle_bytes(card, weights[:-1] + bytes([weights[-1] ^ 1]))


@pytest.mark.parametrize("name", ["weights.pt", "old.PKL", "pytorch_model.bin", "net.pt2"])
def test_a_folder_with_a_pickle_is_refused_and_the_pickle_not_opened(saved, name):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (saved / name).write_bytes(pickle.dumps(Bomb()))

    with pytest.raises(ValueError, match="is a pickle: opening it would run"):
        models.load_bundle(saved)
    with pytest.raises(ValueError, match="is a pickle"):
        models.load_bundle(saved / name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version 2, this version reads 1; update"),
        (lambda c: c.pop("format_version"), "format_version None"),
        (lambda c: c.update(format_version=True), "format_version True"),
        (lambda c: c.update(clases=[]), "no key 'clases'; did you mean 'classes'"),
        (lambda c: c.pop("stride"), "lacks 'stride'"),
        (lambda c: c.update(stride=8), "stride is 8, the model has 4"),
        (lambda c: c.update(stride="4"), "stride must be of type int, it is '4'"),
        (lambda c: c["input"].update(scale=1), "input has no key 'scale'"),
        (lambda c: c["input"].update(mean=[0.5]), "input.mean must hold 3 numbers"),
        (lambda c: c["input"].update(std=[1, 1, 0]), "above 0"),
        (lambda c: c["input"].update(range=[9, 9]), "input.range must rise"),
        (lambda c: c["tile"].update(overlap=512), "overlap 512 must be below tile.size 512"),
        (lambda c: c["classes"][0].update(id=7), "different ids"),
        (lambda c: c["classes"][0].update(id=65_535), "masks hold 0 to 65534"),
        (lambda c: c["classes"][0].update(color=[0, 0]), r"classes\[0\].color must hold 3"),
        (lambda c: c["classes"].pop(), "two or more"),
        (lambda c: c.update(ignore_id=7), "other than ignore_id 7"),
        (lambda c: c["config"].update(width=3), "no option 'width'"),
        (lambda c: c["config"].pop("heads"), "config is"),
        (lambda c: c.update(architecture="unet"), "no architecture 'unet'"),
        (lambda c: c.update(architecture="parts.bundle"), "'parts.bundle', a module outside"),
        (lambda c: c["metrics"].update(miou=float("nan")), "NaN"),
    ],
)
def test_a_card_that_cannot_be_trusted_is_refused_with_its_reason(saved, edit, message):
    with pytest.raises(ValueError, match=message):
        models.load_bundle_bytes(*edited(saved, edit))


@pytest.mark.parametrize("card", [b"", b"\xff\xfe", b"[]", b"{"])
def test_what_is_no_card_is_refused(card):
    with pytest.raises(ValueError, match=r"model\.json"):
        models.load_bundle_bytes(card, b"")


def test_weights_of_another_net_are_refused(saved):
    other = models.build("latent_attention", **{**TINY, "size": "s"})
    weights = tensors.save({k: v.contiguous() for k, v in other.state_dict().items()})
    card, _ = edited(saved, lambda c: c.update(weights_sha256=hashlib.sha256(weights).hexdigest()))

    with pytest.raises(ValueError, match="does not fit architecture 'latent_attention'"):
        models.load_bundle_bytes(card, weights)


def test_what_is_no_safetensors_is_refused(saved):
    weights = b"PK\x03\x04 surely a pickle"
    card, _ = edited(saved, lambda c: c.update(weights_sha256=hashlib.sha256(weights).hexdigest()))

    with pytest.raises(ValueError, match="does not fit"):
        models.load_bundle_bytes(card, weights)


def test_a_card_about_another_model_is_not_saved(tmp_path, model):
    with pytest.raises(ValueError, match="stride is 8, the model has 4"):
        models.save_bundle(tmp_path / "never", model, card_of(model, stride=8))

    assert not (tmp_path / "never").exists()


# -- what only classifiers have ------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path):
    from tests.bundles import tiny_classifier

    return tiny_classifier(tmp_path / "classifier", resize=(40, 24))


def test_a_classifiers_card_says_so_and_at_which_size_it_reads(classifier):
    card = json.loads((classifier / "model.json").read_text())
    model, bundle = models.load_bundle(classifier)

    assert (card["task"], card["input"]["resize"]) == ("classify", [40, 24])
    assert (bundle.task, bundle.input.resize, model.task) == ("classify", (40, 24), "classify")
    assert bundle.to_json() == (classifier / "model.json").read_bytes()


def test_a_card_from_before_there_were_classifiers_keeps_its_name(saved):
    written = (saved / "model.json").read_bytes()
    _, bundle = models.load_bundle(saved)
    spelled_out, _ = edited(
        saved, lambda c: (c.update(task="segment"), c["input"].update(resize=None))
    )

    assert b"task" not in written
    assert b"resize" not in written
    assert bundle.sha256 == hashlib.sha256(written).hexdigest()
    assert models.Bundle.from_json(spelled_out) == bundle


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(task="clasify"), "no task 'clasify'; did you mean 'classify'"),
        (lambda c: c.update(task=None), "task must be of type str"),
        (lambda c: (c.pop("task"), c["input"].pop("resize")), "task is 'segment', the model has"),
        (lambda c: c.pop("task"), "is for classifiers, this task is segment"),
        (lambda c: c["input"].update(resize=[40]), "input.resize must hold 2 numbers"),
        (lambda c: c["input"].update(resize=[40, 0]), "1 or more each"),
        (lambda c: c["input"].update(resize=[40, 24.5]), "input.resize must be of type int"),
    ],
)
def test_a_classifiers_card_that_cannot_be_trusted_is_refused(classifier, edit, message):
    with pytest.raises(ValueError, match=message):
        models.load_bundle_bytes(*edited(classifier, edit))


def test_a_segmenter_is_not_saved_as_a_classifier(tmp_path, model):
    with pytest.raises(ValueError, match="task is 'classify', the model has 'segment'"):
        models.save_bundle(tmp_path / "never", model, card_of(model, task="classify"))
