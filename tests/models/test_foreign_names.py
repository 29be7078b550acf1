"""Architectures outside of models/: a module by its dotted name, and files that are no model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from models import foreign
from tests import guests

ROOT = Path(__file__).parents[2]


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """Writes `acme.nets.unet` where it can be imported."""
    monkeypatch.syspath_prepend(tmp_path / "theirs")

    def written(text=guests.MODULE):
        return guests.module(tmp_path / "theirs", text)

    return written


@pytest.fixture
def bundle(acme, tmp_path):
    """A bundle folder whose card names that module."""
    return guests.module_bundle(tmp_path / "bundle", acme())


# -- a module by its name ------------------------------------------------------------------------


def test_a_dotted_name_builds_what_the_module_offers(acme):
    name = acme()

    model = models.build(name, width=6, classes=3)

    assert model(torch.randn(2, 3, 20, 30)).shape == (2, 3, 20, 30)
    assert model.config.to_json() == {"channels": 3, "classes": 3, "width": 6}
    assert not any("." in known or known in foreign.NAMES for known in models.names())


def test_its_options_are_checked_like_ours(acme):
    name = acme()

    with pytest.raises(
        ValueError, match=r"acme\.nets\.unet' has no option 'widht'; did you mean 'w"
    ):
        models.build(name, widht=6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "offers no Config; define one that inherits"),
        ("class Config: pass", "offers no Config"),
        ("from models.parts.configs import ModelConfig as Config", r"offers no build\(config\)"),
        (
            "from models.parts.configs import ModelConfig as Config\ndef build(config): return 3",
            "build of module acme.nets.unet returned int; it must return a models.parts.segm",
        ),
        ("import nowhere_to_be_found", "needs nowhere_to_be_found, which is not installed"),
        ("from torch import nothing_like_it", "cannot be imported: cannot import name"),
        ("def (", "cannot be imported: invalid syntax"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_with_the_way_out(acme, text, message):
    with pytest.raises(ValueError, match=message):
        models.build(acme(text))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme.nowhere", r"there is no module acme\.nowhere .*PYTHONPATH"),
        ("nowhere_at_all.nets.unet", "there is no module nowhere_at_all"),
        ("models.latent_attention", "a dotted name is a module outside of Maskfleet"),
        ("pipeline.run", "a module outside of Maskfleet"),
        (".unet", "is no name of a module"),
        ("acme..unet", "is no name of a module"),
        ("acme.un-et", "is no name of a module"),
        ("../unet", "is no name of a module"),
    ],
)
def test_a_name_that_is_no_module_outside_is_refused(acme, name, message):
    acme()

    with pytest.raises(ValueError, match=message):
        models.build(name)


# -- a card that names a module ------------------------------------------------------------------


def test_a_card_that_names_a_module_is_loaded_if_the_caller_names_it_too(bundle):
    model, card = models.load_bundle(bundle, architecture="acme.nets.unet")
    files = foreign.bundle_at(bundle)
    again, _ = models.load_bundle_bytes(*files, architecture="acme.nets.unet")
    x_1CHW = torch.randn(1, 3, 20, 30)

    assert card.architecture == "acme.nets.unet"
    assert torch.equal(again(x_1CHW), model(x_1CHW))


def test_a_card_alone_does_not_run_the_code_of_a_module(bundle, tmp_path):
    shutil.rmtree(tmp_path / "theirs")
    guests.module(tmp_path / "theirs", "raise SystemExit('it ran')")

    with pytest.raises(ValueError, match=r"say so: --architecture acme\.nets\.unet on the"):
        models.load_bundle(bundle)
    with pytest.raises(ValueError, match=r"the caller 'acme\.nets\.vit'; both must be"):
        models.load_bundle(bundle, architecture="acme.nets.vit")
    assert "acme.nets.unet" not in sys.modules


def test_naming_one_of_ours_must_be_right_too(tiny_bundle):
    models.load_bundle(tiny_bundle, architecture="latent_attention")

    with pytest.raises(ValueError, match=r"'latent_attention', the caller 'acme\.nets\.unet'"):
        models.load_bundle(tiny_bundle, architecture="acme.nets.unet")


# -- what is no model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["net.pt", "net.pth", "net.pt2", "net.PKL", "net.bin", "net.ckpt", "net.torchscript"]
)
def test_what_would_run_code_is_refused_and_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\3\4")

    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name} is a pickle") as refused:
            models.load_bundle(path)
        assert "safetensors" in str(refused.value)


def test_a_folder_without_a_model_says_what_one_is(tmp_path):
    (tmp_path / "notes.txt").touch()

    with pytest.raises(ValueError, match=r"no bundle there; a bundle is a folder with model\.json"):
        models.load_bundle(tmp_path)


def test_of_two_onnx_files_none_is_chosen(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        guests.onnx_file(tmp_path / name)

    with pytest.raises(ValueError, match="no bundle there"):
        models.load_bundle(tmp_path)


def test_a_bundle_is_not_read_for_a_checkpoint_beside_it(tiny_bundle, tmp_path):
    """Where a card lies, it says what the folder is."""
    (tmp_path / "model.json").write_bytes((tiny_bundle / "model.json").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')

    with pytest.raises(ValueError, match="no bundle there"):
        foreign.bundle_at(tmp_path)


def test_importing_models_imports_nothing_heavy():
    code = (
        "import sys, models, models.foreign.named\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import models.foreign.huggingface, models.foreign.onnx\n"
        "heavy = {'transformers', 'onnx', 'onnxruntime', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
