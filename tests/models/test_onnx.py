"""ONNX files: what onnxruntime answers is what torch would, at any size, and what is refused."""

import copy
import json
import pickle
import sys

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import models
from models import foreign
from models.foreign.onnx import bundle_of
from tests import guests

WHOLE = {"classes": ["ground", "nucleus", "debris"], "mean": [0.2] * 3, "std": [0.25] * 3}


def loaded(**options):
    return models.load_bundle_bytes(*bundle_of(guests.graph(**options).SerializeToString()))


# -- the same answers ----------------------------------------------------------------------------


def test_a_file_answers_as_its_operators_say():
    model, _ = loaded()
    x_BCHW = torch.randn(2, 3, 64, 96)

    found = model(x_BCHW, native=True)

    assert (model.stride, model.multiple, model.square, model.max_side) == (4, 32, False, None)
    torch.testing.assert_close(found, guests.by_hand(x_BCHW), rtol=1e-5, atol=1e-5)
    assert model(x_BCHW).shape == (2, 3, 64, 96)


@pytest.mark.parametrize("batch", ["n", 1])
def test_items_of_different_sizes_answer_as_they_do_alone(batch):
    """A file of one picture at a time is asked as often as there are pictures."""
    model, _ = loaded(batch=batch)
    sizes = [(1, 1), (33, 50), (61, 17), (64, 64)]
    x_BCHW = torch.full((4, 3, 64, 64), torch.nan)
    for x_CHW, (h, w) in zip(x_BCHW, sizes, strict=True):
        x_CHW[:, :h, :w] = torch.randn(3, h, w)

    together = model.grid(*model.together(x_BCHW, sizes))

    for i, x_1CHW in enumerate(model.alone(x_BCHW, sizes)):
        h, w = model.native_size(*sizes[i])
        alone = model.grid(x_1CHW, None)[0, :, :h, :w]
        torch.testing.assert_close(together[i, :, :h, :w], alone, rtol=1e-6, atol=1e-6)
    whole = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(model.grid(whole, None), guests.by_hand(whole), rtol=1e-5, atol=1e-5)


def test_an_answer_on_the_cpu_does_not_depend_on_batch_mates_by_a_single_bit():
    model, _ = loaded()
    x_BCHW, sizes_B2 = torch.randn(2, 3, 64, 64), torch.tensor([[40, 64], [33, 40]])

    together = model(x_BCHW, sizes_B2)

    assert torch.equal(together[1:, :, :33, :40], model(x_BCHW[1:, :, :33, :40]))


def test_a_file_of_one_size_gets_it_and_says_so():
    model, card = loaded(batch=1, size=(64, 96))
    x_1CHW = torch.randn(1, 3, 40, 20)

    found = model(x_1CHW, native=True)
    padded = guests.by_hand(nn.functional.pad(x_1CHW, (0, 76, 0, 24)))

    assert (model.max_side, card.tile) == (64, models.TileInfo(64, 8))
    torch.testing.assert_close(found, padded[:, :, :10, :5], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="64 x 80: this model reads sides of up to 64"):
        model(torch.zeros(1, 3, 64, 80))


def test_gray_pictures_and_other_precisions_are_read():
    model, card = loaded(channels=1)
    x_1CHW = torch.randn(1, 1, 64, 32, dtype=torch.float64)

    found = model.double()(x_1CHW, native=True)

    assert found.dtype == torch.float64
    assert card.input == models.InputInfo(1, (0.449,), (0.226,))
    torch.testing.assert_close(found, guests.by_hand(x_1CHW.float()).double(), rtol=1e-5, atol=1e-5)


# -- the bundle ----------------------------------------------------------------------------------


def test_a_file_is_the_same_bundle_every_time_and_everywhere(tmp_path):
    first = guests.onnx_file(tmp_path / "a/net.onnx")
    second = guests.onnx_file(tmp_path / "b/other.ONNX")

    assert foreign.bundle_at(first) == foreign.bundle_at(second)
    assert foreign.bundle_at(tmp_path / "a") == foreign.bundle_at(first)  # a folder of one file


def test_it_is_loaded_and_saved_like_any_other_bundle(tmp_path):
    model, card = models.load_bundle(guests.onnx_file(tmp_path / "net.onnx"))
    models.save_bundle(tmp_path / "bundle", model, card)
    x_1CHW = torch.randn(1, 3, 50, 70)

    again, same = models.load_bundle(tmp_path / "bundle")

    assert same == card
    assert same.architecture == "onnx"
    assert torch.equal(again(x_1CHW), model(x_1CHW))
    assert set(again.state_dict()) == {"onnx"}


def test_it_can_be_built_without_memory_copied_and_folded():
    model, card = loaded()
    x_1CHW = torch.randn(1, 3, 32, 32)
    expected = model(x_1CHW)

    with torch.device("meta"):
        assert models.build("onnx", **card.config).onnx.is_meta
    assert model.folded() is model
    assert torch.equal(copy.deepcopy(model)(x_1CHW), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x_1CHW), expected)


def test_another_file_is_not_taken_for_this_one():
    card, _ = bundle_of(guests.graph().SerializeToString())
    _, weights = bundle_of(guests.graph(classes=["a", "b", "c"]).SerializeToString())

    with pytest.raises(ValueError, match="damaged or not of one bundle"):
        models.load_bundle_bytes(card, weights)


# -- the card ------------------------------------------------------------------------------------


def test_what_a_file_does_not_say_has_defaults():
    _, card = loaded()

    assert [entry.name for entry in card.classes] == ["class 0", "class 1", "class 2"]
    assert [entry.color for entry in card.classes] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    assert card.input.mean == (0.485, 0.456, 0.406)
    assert "the file names none" in card.provenance["normalisation"]
    assert card.provenance["producer"] == "a test"


def test_what_a_file_says_is_in_the_card():
    classes = ["ground", {"name": "nucleus", "id": 300}, {"name": "x", "color": [1, 2, 3]}]
    model, card = loaded(classes=classes, mean=[0.2, 0.3, 0.4], std=[1, 2, 3], multiple=8)

    assert card.classes == (
        models.ClassInfo(0, "ground", (0, 0, 0)),
        models.ClassInfo(300, "nucleus", (128, 0, 0)),
        models.ClassInfo(2, "x", (1, 2, 3)),
    )
    assert card.ignore_id == 65_535  # masks of 16 bits
    assert card.input == models.InputInfo(3, (0.2, 0.3, 0.4), (1.0, 2.0, 3.0))
    assert model.multiple == 8


# -- refused -------------------------------------------------------------------------------------


def changed(change):
    made = guests.graph()
    change(made)
    return made.SerializeToString()


def outside(tensor):
    """Let a tensor lie in another file, one that somebody would like to see."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secrets.bin")


def hidden_outside(model):
    """The same, inside the branch of a node."""
    value = numpy_helper.from_array(torch.zeros(1).numpy(), "deep")
    outside(value)
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=value)],
        "branch",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])],
    )
    model.graph.node.append(
        helper.make_node("If", ["never"], ["d"], then_branch=branch, else_branch=branch)
    )


def reads(model, kind=TensorProto.FLOAT, shape=("n", 3, "h", "w")):
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, shape))


def labels(model):
    model.graph.node.append(helper.make_node("ArgMax", ["y"], ["z"], axis=1, keepdims=0))
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("z", TensorProto.INT64, [None] * 3)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: b"junk", "this is no ONNX file"),
        (lambda: b"", "cannot run the file: .*"),
        (lambda: changed(lambda m: outside(m.graph.initializer[0])), "'kernel' lies in another"),
        (lambda: changed(hidden_outside), "'deep' lies in another file, which is not read; save"),
        (lambda: changed(labels), r"first output has shape \(1, 96, 96\), not"),
        (lambda: changed(lambda m: reads(m, TensorProto.UINT8)), "cannot run the file: .*uint8"),
        (lambda: changed(lambda m: reads(m, shape=("n", "c", "h", "w"))), "of 1 or 3 channels"),
        (lambda: changed(lambda m: reads(m, shape=("n", 3, 64, "w"))), "both sides dynamic, or"),
        (lambda: changed(lambda m: setattr(m.graph.node[0], "domain", "theirs")), "cannot run the"),
        (
            lambda: guests.graph(batch=4).SerializeToString(),
            "reads batches of 4 and nothing else; export it with a batch of 1",
        ),
        (  # 1 x 4 tiles have as many cells as 2 x 2, and would come back as those
            lambda: guests.graph(reshaped=(1, 3, 16, 16)).SerializeToString(),
            "cannot be used on pictures of different sizes",
        ),
        (
            lambda: guests.graph(size=(64, 64), reshaped=(1, 3, 8, 32)).SerializeToString(),
            r"fraction of their size \(64 x 64 came back as 8 x 32\); this net cannot be used on",
        ),
        (lambda: guests.graph(clases=[]).SerializeToString(), "did you mean 'classes'"),
        (lambda: guests.graph(classes=["a"]).SerializeToString(), "names 1, the file gives 3"),
        (lambda: guests.graph(classes=[1, 2, 3]).SerializeToString(), r"maskfleet\.classes is"),
        (lambda: guests.graph(mean=5).SerializeToString(), r"maskfleet\.mean is '5'"),
        (lambda: guests.graph(mean=[0.5]).SerializeToString(), "must hold 3 numbers"),
        (lambda: guests.graph(std=[1, 1, 0]).SerializeToString(), "std must be above 0"),
        (lambda: guests.graph(multiple=0).SerializeToString(), "a whole number, 1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_reason(data, message):
    with pytest.raises(ValueError, match=message):
        bundle_of(data())


def test_a_tensor_elsewhere_is_not_read_from_a_bundle_either():
    """A bundle folder is not made by us: what it holds is looked at again."""
    data = changed(lambda m: outside(m.graph.initializer[0]))
    model = models.build("onnx", classes=3, nbytes=len(data))
    model.load_state_dict({"onnx": torch.frombuffer(bytearray(data), dtype=torch.uint8)})

    with pytest.raises(ValueError, match="'kernel' lies in another file"):
        model(torch.zeros(1, 3, 32, 32))


def test_running_out_of_memory_is_said_as_elsewhere(monkeypatch):
    from models.foreign.onnx import _answer

    class Full:
        def get_inputs(self):
            return [type("Input", (), {"name": "x", "shape": ["n", 3, "h", "w"]})]

        def get_outputs(self):
            return [type("Output", (), {"name": "y"})]

        def run(self, names, given):
            raise onnxruntime_error(
                "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested"
            )

    class onnxruntime_error(Exception):  # noqa: N801 - a stand-in for a type without a name
        pass

    with pytest.raises(MemoryError, match="allocate memory"):
        _answer(Full(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_the_way_to_them_is_named(monkeypatch, package):
    data = guests.graph().SerializeToString()
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ValueError, match=rf"needs {package}.*pip install 'maskfleet\[onnx\]'"):
        bundle_of(data)


def test_onnx_says_what_is_wrong_in_its_own_words_too():
    """The checker that people use agrees that the graph of these tests is one."""
    onnx.checker.check_model(guests.graph(), full_check=True)
    assert json.loads(guests.graph(**WHOLE).metadata_props[0].value) == WHOLE["classes"]
