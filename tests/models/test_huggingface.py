"""Checkpoints of transformers: the same answers, at any size, and what is refused. All are tiny."""

import hashlib
import json
import math
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors import torch as tensors
from torch import nn

import models
from models import foreign
from tests import guests

ONE_SIZE, SQUARES, SWAPPED = {"data2vec"}, {"dpt"}, {"mobilevit", "mobilevitv2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoint folders by family, each made once."""
    made = {}

    def folder_of(family="segformer"):
        if family not in made:
            made[family] = guests.checkpoint(tmp_path_factory.mktemp("hf") / family, family)
        return made[family]

    return folder_of


@pytest.fixture
def own(folders, tmp_path):
    """A SegFormer's folder of one's own, to damage."""
    return Path(shutil.copytree(folders(), tmp_path / "checkpoint"))


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# -- the same answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", guests.FAMILIES)
def test_a_checkpoint_answers_as_transformers_does(folders, family):
    model, card = models.load_bundle(folders(family))
    sizes = [(64, 64)] if family in ONE_SIZE | SQUARES else [(64, 96), (160, 32)]

    for size in sizes:
        x_BCHW = torch.randn(2, 3, *size)
        with torch.inference_mode():
            given = x_BCHW.flip(1) if family in SWAPPED else x_BCHW
            expected = guests.net_of(family)(pixel_values=given).logits
            found = model(x_BCHW, native=family[:7] != "upernet")  # it stretches its scores itself
        assert expected.std() > 1e-3  # else equality would prove nothing
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert [entry.name for entry in card.classes] == list(guests.NAMES)
    assert not model.training


@pytest.mark.parametrize("family", guests.FAMILIES)
def test_items_of_different_sizes_answer_as_they_do_alone(folders, family):
    """The way of the GPU, walked on the CPU; what lies outside of an item may be NaN."""
    model = models.load_bundle(folders(family))[0].double()
    sizes = [(1, 1), (33, 50), (61, 17), (64, 64)]
    x_BCHW = torch.full((4, 3, 64, 64), math.nan, dtype=torch.float64)
    for x_CHW, (h, w) in zip(x_BCHW, sizes, strict=True):
        x_CHW[:, :h, :w] = torch.randn(3, h, w)

    with torch.inference_mode():
        together = model.grid(*model.together(x_BCHW, sizes))
        for i, x_1CHW in enumerate(model.alone(x_BCHW, sizes)):
            h, w = model.native_size(*sizes[i])
            alone = model.grid(x_1CHW, None)[0, :, :h, :w]
            torch.testing.assert_close(together[i, :, :h, :w], alone, rtol=0, atol=1e-9)
        whole = model(x_BCHW, torch.tensor(sizes))

    assert whole.shape == (4, 3, 64, 64)
    assert whole.isfinite().all()


def test_a_net_that_reads_squares_only_gets_squares(folders):
    """Its head takes the root of the number of tokens: 32 x 128 would be read as 64 x 64."""
    model, _ = models.load_bundle(folders("dpt"))
    x_1CHW = torch.randn(1, 3, 32, 128)

    with torch.inference_mode():
        found = model(x_1CHW)
        square = model(nn.functional.pad(x_1CHW, (0, 0, 0, 96)))

    assert model.padded_size(32, 128) == (128, 128)
    assert torch.equal(found, square[:, :, :32])


def test_a_net_of_one_size_gets_it_and_says_so(folders):
    model, card = models.load_bundle(folders("data2vec"))
    x_1CHW = torch.randn(1, 3, 40, 20)

    with torch.inference_mode():
        found = model(x_1CHW, native=True)
        padded = model(nn.functional.pad(x_1CHW, (0, 44, 0, 24)), native=True)

    assert (model.max_side, card.tile.size) == (64, 64)
    assert torch.equal(found, padded[:, :, :10, :5])
    with pytest.raises(ValueError, match="65 x 64: this model reads sides of up to 64; cut"):
        model(torch.zeros(1, 3, 65, 64))


def test_an_answer_of_another_shape_is_not_taken(folders):
    model, _ = models.load_bundle(folders())
    model.net.decode_head = nn.Sequential()
    model.net.forward = lambda pixel_values: type("Answer", (), {"logits": pixel_values})

    with pytest.raises(ValueError, match=r"shape \(1, 3, 64, 64\) instead of \(1, 3, 16, 16\)"):
        model(torch.zeros(1, 3, 64, 64))


def test_an_answer_on_the_cpu_does_not_depend_on_batch_mates_by_a_single_bit(folders):
    model, _ = models.load_bundle(folders())
    x_BCHW, sizes_B2 = torch.randn(2, 3, 64, 64), torch.tensor([[40, 64], [33, 40]])

    with torch.inference_mode():
        together = model(x_BCHW, sizes_B2)
        alone = model(x_BCHW[1:, :, :33, :40])

    assert torch.equal(together[1:, :, :33, :40], alone)


def test_the_folded_form_is_the_net_itself_in_eval_mode(folders):
    model, _ = models.load_bundle(folders())

    assert model.train().folded() is model
    assert not model.training


# -- the bundle ----------------------------------------------------------------------------------


def test_a_checkpoint_is_the_same_bundle_every_time_and_everywhere(folders, own):
    first, second = foreign.bundle_at(folders()), foreign.bundle_at(own)

    assert first == second
    assert b"tmp" not in first[0]  # no path, no date
    assert json.loads(first[0])["weights_sha256"] == hashlib.sha256(first[1]).hexdigest()


def test_it_is_loaded_and_saved_like_any_other_bundle(folders, tmp_path):
    model, card = models.load_bundle(folders("upernet-convnext"))
    models.save_bundle(tmp_path / "bundle", model, card)
    x_1CHW = torch.randn(1, 3, 50, 70)

    again, same = models.load_bundle(tmp_path / "bundle")

    assert same == card
    assert same.architecture == "huggingface"
    with torch.inference_mode():
        assert torch.equal(again(x_1CHW), model(x_1CHW))
    assert not any("auxiliary" in key for key in again.state_dict())


def test_loading_leaves_the_random_numbers_alone(folders):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    models.load_bundle(folders())

    assert torch.equal(torch.rand(3), expected)


def test_it_can_be_built_without_memory(folders):
    _, card = models.load_bundle(folders())

    with torch.device("meta"):
        model = models.build("huggingface", **card.config)

    assert all(value.is_meta for value in model.parameters())


def test_the_options_of_a_guest_are_checked():
    with pytest.raises(ValueError, match="at least 2, it is 1"):
        models.build("huggingface", classes=1)
    with pytest.raises(ValueError, match="multiple 6 must be a multiple of stride 4"):
        models.build("huggingface", stride=4, multiple=6)
    with pytest.raises(ValueError, match="the card's checkpoint is not JSON"):
        models.build("huggingface")


def test_weights_in_several_files_are_put_together(folders, tmp_path):
    guests.save(guests.net_of("segformer"), tmp_path, max_shard_size="20KB")

    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert foreign.bundle_at(tmp_path) == foreign.bundle_at(folders())


def test_weights_of_half_precision_are_read_as_float32(own):
    state = tensors.load_file(own / "model.safetensors")
    halved = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    tensors.save_file(halved, own / "model.safetensors", {"format": "pt"})
    edit(own / "config.json", lambda c: c.update(dtype="float16", torch_dtype="float16"))

    model, _ = models.load_bundle(own)

    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_a_pickle_beside_safetensors_is_not_opened(own):
    (own / "pytorch_model.bin").write_bytes(bomb())

    models.load_bundle(own)


def test_nothing_is_fetched(own, monkeypatch):
    def refused(*arguments):
        pytest.fail(f"somebody was asked: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)

    models.load_bundle(own)


def test_only_what_the_family_declares_is_used(own):
    expected = foreign.bundle_at(own)
    edit(
        own / "config.json",
        lambda c: c.update(
            auto_map={"AutoModelForSemanticSegmentation": "theirs.Net"},
            attn_implementation="somebody/kernel",
            _attn_implementation="somebody/kernel",
            fusion_config={"patch_embeddings": True},
            return_dict=False,
            output_attentions=True,
        ),
    )

    assert foreign.bundle_at(own) == expected


# -- the card ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "mean", "std", "source"),
    [
        (None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "the checkpoint names none"),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3, "none"),
        (
            {"image_mean": [0.5] * 3, "image_std": [0.25] * 3},
            (0.5,) * 3, (0.25,) * 3, "preprocessor_config.json",
        ),
        (  # pixels become -1 to 1 before the mean is taken
            {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "rescale_factor": 2 / 255},
            (0.25,) * 3, (0.125,) * 3, "preprocessor_config.json",
        ),
        (  # pixels stay 0 to 255
            {"image_mean": [51.0] * 3, "image_std": [25.5] * 3, "do_rescale": False},
            (0.2,) * 3, (0.1,) * 3, "preprocessor_config.json",
        ),
    ],
)  # fmt: skip
def test_normalisation_is_that_of_the_processor(own, processor, mean, std, source):
    if processor is not None:
        (own / "preprocessor_config.json").write_text(json.dumps(processor))

    card = models.Bundle.from_json(foreign.bundle_at(own)[0])

    assert card.input.mean == pytest.approx(mean)
    assert card.input.std == pytest.approx(std)
    assert source in card.provenance["normalisation"]


def test_means_are_turned_with_the_channels(own):
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (own / "preprocessor_config.json").write_text(
        json.dumps({**said, "do_flip_channel_order": True})
    )

    model, card = models.load_bundle(own)

    assert model.blue_first
    assert card.input.mean == (0.3, 0.2, 0.1)
    assert card.input.std == (0.6, 0.5, 0.4)


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ({"height": 512, "width": 640}, (512, 64)),
        ({"shortest_edge": 518}, (512, 64)),
        (256, (256, 32)),
        ({"height": 32, "width": 32}, None),
        (None, None),
    ],
)
def test_tiles_are_of_the_size_that_the_net_was_shown(own, size, tile):
    (own / "preprocessor_config.json").write_text(json.dumps({"size": size}))

    card = models.Bundle.from_json(foreign.bundle_at(own)[0])

    assert card.tile == (None if tile is None else models.TileInfo(*tile))


@pytest.mark.parametrize(("said", "held"), [(255, 255), (-100, 255), (2, 255), (7, 7)])
def test_the_label_left_out_of_training_is_kept_where_masks_can_hold_it(own, said, held):
    edit(own / "config.json", lambda c: c.update(semantic_loss_ignore_index=said))

    assert json.loads(foreign.bundle_at(own)[0])["ignore_id"] == held


def test_every_class_has_a_colour_of_its_own():
    from models.foreign.guest import colour

    assert len({colour(i) for i in range(1000)}) == 1000
    assert [colour(i) for i in (0, 1, 15)] == [(0, 0, 0), (128, 0, 0), (192, 128, 128)]  # VOC's


# -- refused -------------------------------------------------------------------------------------


def bomb() -> bytes:
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    return pickle.dumps(Bomb())


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(bomb())


def without(key):
    def change(folder):
        state = tensors.load_file(folder / "model.safetensors")
        del state[key]
        tensors.save_file(state, folder / "model.safetensors")

    return change


def with_more(folder):
    state = tensors.load_file(folder / "model.safetensors")
    tensors.save_file({**state, "spare": torch.zeros(2)}, folder / "model.safetensors")


def says(**values):
    return lambda folder: edit(folder / "config.json", lambda c: c.update(values))


def processed(**values):
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(values))


def indexed(name):
    def change(folder):
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only_a_pickle, r"pytorch_model\.bin is a pickle.*save_pretrained"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is not;"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4"), "no safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "must hold an object, it holds list"),
        (says(model_type="segfomer"), "did you mean 'segformer'"),
        (says(model_type="bert"), "no semantic segmentation for model_type 'bert'"),
        (says(model_type=None), "model_type None"),
        (says(architectures=["SegformerForImageClassification"]), "ImageClassification, only sem"),
        (says(quantization_config={"load_in_8bit": True}), "quantised"),
        (says(backbone="somebody/net"), "backbone 'somebody/net' names a backbone outside"),
        (says(use_timm_backbone=True), "nothing is fetched"),
        (
            says(
                model_type="upernet", architectures=None,
                backbone_config={"model_type": "timm_backbone"},
            ),
            "the backbone is one of timm",
        ),
        (says(hidden_act="nothing"), "transformers cannot make this net: .*nothing"),
        (
            processed(do_flip_channel_order=True, image_mean=3, image_std=1),
            "preprocessor_config.json cannot be used: .*int",
        ),
        (says(depths="deep"), r"config\.json cannot be used"),
        (says(id2label={"0": "a", "2": "b"}), r"from 0, and at least 2, it names \[0, 2\]"),
        (says(id2label={"0": "a"}), r"at least 2, it names \[0\]"),
        (says(hidden_sizes=[8, 16, 16, 32]), r"25 mismatched \(decode_head"),
        (without("decode_head.classifier.bias"), r"1 missing \(decode_head\.classifier\.bias\)"),
        (with_more, r"1 unexpected \(spare\)"),
        (indexed("../outside.safetensors"), "names '../outside.safetensors', which is no"),
        (indexed("model-1.bin"), "names 'model-1.bin', which is no"),
        (
            processed(rescale_factor=0),
            "preprocessor_config.json cannot be used: .*zero",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_reason(own, change, message):
    change(own)

    with pytest.raises(ValueError, match=message):
        models.load_bundle(own)


def test_without_the_package_the_way_to_it_is_named(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(ValueError, match=r"pip install 'maskfleet\[huggingface\]'"):
        models.load_bundle(own)
