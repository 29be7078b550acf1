"""Passes in C beside what torch says, by every set of instructions known here; and without any."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

import models
from models.parts import kernels
from models.parts.conv3x3 import Winograd
from models.parts.kernels import operations
from models.parts.resize import upsampled
from pipeline.heap import out_of_memory


def test_they_are_compiled():
    sets = list(kernels.known())
    if not sets and "CI" not in os.environ:
        pytest.skip("nothing was compiled: no C compiler when this was installed")
    assert sets


def draws(*shape: int, spread: float = 1.0) -> torch.Tensor:
    seed = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=seed) * spread


TOKENS = [(1, 1, 8), (1, 257, 64), (2, 600, 20), (3, 31, 32), (1, 1000, 3)]
"""Batch, tokens, features: one alone, more than a block, no multiple of anything, a whole panel."""


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 1000.0])
@torch.inference_mode()
def test_queries_read_as_by_torch(shape, rows, spread):
    x_BTF, query_PF = draws(*shape), draws(rows, shape[2], spread=spread)

    found = operations.read(x_BTF, query_PF)

    scores_BPT = query_PF @ x_BTF.mT
    # 2^x of x / ln 2, whose rounding grows with x, which is rounded itself
    close = {"rtol": 1e-5 + 2e-6 * spread, "atol": 1e-6 + 2e-6 * spread}
    torch.testing.assert_close(found, scores_BPT.softmax(2) @ x_BTF, **close)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("ascending", [True, False])
@torch.inference_mode()
def test_reading_minds_a_greater_score_that_comes_late(ascending):
    x_1TF = torch.linspace(-300, 300, 2000).sort(descending=not ascending).values[None, :, None]

    found = operations.read(x_1TF.contiguous(), torch.ones(1, 1))

    torch.testing.assert_close(found, x_1TF.softmax(1).mT @ x_1TF, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("instructions")
@torch.inference_mode()
def test_a_mean_of_a_million_tokens_is_as_exact_as_of_a_thousand():
    x_1TF = torch.full((1, 1_000_000, 4), 0.3)

    found = operations.read(x_1TF, torch.zeros(3, 4))

    torch.testing.assert_close(found, torch.full((1, 3, 4), 0.3), rtol=2e-5, atol=0)


@pytest.mark.usefixtures("instructions")
@torch.inference_mode()
def test_scores_of_minus_infinity_have_no_share_and_alone_there_is_no_mean():
    x_1TF = torch.full((1, 900, 1), -torch.inf)
    x_1TF[0, 700:] = 2.0
    pairs_1TF = torch.cat([x_1TF.clamp(min=-1), x_1TF], 2)  # what is read, and what scores

    found = operations.read(pairs_1TF.contiguous(), torch.tensor([[0.0, 1.0]]))

    assert found[0, 0, 0] == 2.0
    none = operations.read(torch.full((1, 300, 1), -torch.inf), torch.ones(1, 1))
    assert none.isnan().all()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("place", [0, 100, 255, 256, 299])
@torch.inference_mode()
def test_reading_and_asking_hide_nothing_that_is_no_number(place):
    x_BTF = torch.ones(1, 300, 4)
    x_BTF[0, place, 2] = torch.nan
    asking = draws(1, 6, 4), draws(1, 6, 1), draws(1, 3, 6), draws(3), 2

    assert operations.read(x_BTF, torch.ones(2, 4)).isnan().all()
    hidden_T = operations.ask(x_BTF, *asking)[0].isnan()
    assert hidden_T[:, place].all()
    assert hidden_T.sum() == 3


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shape", TOKENS)
@pytest.mark.parametrize(("heads", "experts", "outputs"), [(1, 1, 1), (4, 16, 11), (2, 5, 150)])
@pytest.mark.parametrize("spread", [1.0, 100.0])
@torch.inference_mode()
def test_tokens_ask_as_by_torch(shape, heads, experts, outputs, spread):
    batch, _, features = shape
    rows, x_BTF = heads * experts, draws(*shape)
    score_BPF = draws(batch, rows, features, spread=spread)
    score_BP1 = draws(batch, rows, 1)
    answer_BOP, bias_O = draws(batch, outputs, rows), draws(outputs)

    found = operations.ask(x_BTF, score_BPF, score_BP1, answer_BOP, bias_O, heads)

    scores_BPT = score_BPF @ x_BTF.mT + score_BP1
    shares_BPT = scores_BPT.unflatten(1, (heads, -1)).softmax(2).flatten(1, 2)
    told_BOT = answer_BOP @ shares_BPT + bias_O[:, None]
    close = {"rtol": 1e-4 + 2e-6 * spread, "atol": 1e-4 + 2e-6 * spread}
    torch.testing.assert_close(found, told_BOT, **close)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("size", ["xs", "s", "m"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (48, 208), (112, 64)])
@torch.inference_mode()
def test_the_shipped_net_is_torchs(size, height, width, monkeypatch):
    torch.manual_seed(0)
    model = models.build("latent_attention", variant="plus", size=size, classes=3).eval()
    x_BCHW = draws(2, 3, height, width)
    folded = model.folded()

    found = folded(x_BCHW)
    monkeypatch.setattr(kernels, "LIBRARY", None)

    torch.testing.assert_close(found, folded(x_BCHW), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("own", "features", "thoughts"), [(5, 20, 9), (32, 64, 128), (3, 70, 40)])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 52), (12, 100)])
@torch.inference_mode()
def test_cells_are_classified_as_by_torch(own, features, thoughts, height, width):
    heads, experts, classes, epsilon = 2, 3, 7, 1e-5
    fine, half, quarter = (
        draws(2, height // factor, width // factor, channels)
        for factor, channels in [(1, own), (2, features), (4, features)]
    )
    lateral_FC, lateral_F = draws(features, own), draws(features)
    score_BPF, score_BP1 = draws(2, heads * experts, features), draws(2, heads * experts, 1)
    answer_BFP, answer_F = draws(2, features, heads * experts), draws(features)
    widen_XF, widen_X = draws(thoughts, features), draws(thoughts)
    head_KF, narrow_KX, bias_K = draws(classes, features), draws(classes, thoughts), draws(classes)

    found = operations.classify(
        *(fine, *operations.wide(lateral_FC, lateral_F), half, quarter),
        *(score_BPF, score_BP1, answer_BFP, answer_F, heads),
        *(widen_XF, widen_X, head_KF, narrow_KX, bias_K, epsilon),
    )

    wider = [upsampled(x.permute(0, 3, 1, 2), f) for x, f in [(half, 2), (quarter, 4)]]
    cells_BhwF = fine @ lateral_FC.mT + lateral_F + sum(wider).permute(0, 2, 3, 1)
    cells_BTF = cells_BhwF.flatten(1, 2)
    scores_BPT = score_BPF @ layer_norm(cells_BTF, (features,), eps=epsilon).mT + score_BP1
    shares_BPT = scores_BPT.unflatten(1, (heads, -1)).softmax(2).flatten(1, 2)
    known_BTF = cells_BTF + (answer_BFP @ shares_BPT).mT + answer_F
    normal_BTF = layer_norm(known_BTF, (features,), eps=epsilon)
    thought_BTX = torch.relu(normal_BTF @ widen_XF.mT + widen_X)
    wanted_BTK = known_BTF @ head_KF.mT + thought_BTX @ narrow_KX.mT + bias_K
    wanted_BKhw = wanted_BTK.mT.unflatten(2, (height, width))
    torch.testing.assert_close(found, wanted_BKhw, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("height", "width"), [(2, 4), (4, 6), (0, 4)])
def test_maps_without_halves_and_quarters_are_refused(height, width):
    maps = [torch.zeros(1, height // f, width // f, 8) for f in (1, 2, 4)]
    layer = operations.wide(torch.zeros(8, 8), torch.zeros(8))
    asking = torch.zeros(1, 2, 8), torch.zeros(1, 2, 1), torch.zeros(1, 8, 2), torch.zeros(8), 1
    thinking = torch.zeros(8, 8), torch.zeros(8), torch.zeros(2, 8), torch.zeros(2, 8)

    with pytest.raises(ValueError, match="has no halves and quarters"):
        operations.classify(maps[0], *layer, *maps[1:], *asking, *thinking, torch.zeros(2), 1e-5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4, 5)])
def test_values_that_do_not_fit_are_refused(shape):
    values_HX, factors = np.zeros((4, 4), np.uint8), (np.ones(4, np.float32),) * 2

    with pytest.raises(ValueError, match="do not fit"):
        kernels.feed(values_HX, *factors, np.zeros(shape, np.float32))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("spread", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 16, 20, 96])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (9, 40)])
@torch.inference_mode()
def test_a_block_is_torchs(channels, spread, height, width):
    inside, conv2d = 2 * channels, torch.nn.functional.conv2d
    x_BCHW = draws(2, channels, height, width)
    window_C1yx, widen_XC, narrow_CX = (
        draws(channels, 1, 3, 3), draws(inside, channels), draws(channels, inside)
    )  # fmt: skip
    biases = draws(channels), draws(inside), draws(channels)

    found = operations.block(
        x_BCHW.permute(0, 2, 3, 1).contiguous(),
        spread,
        window_C1yx[:, 0].permute(1, 2, 0).reshape(9, channels).contiguous(),
        biases[0],
        *operations.wide(widen_XC, biases[1]),
        *operations.wide(narrow_CX, biases[2]),
    )

    about = {"padding": spread, "dilation": spread, "groups": channels}
    seen_BHWC = conv2d(x_BCHW, window_C1yx, biases[0], **about).permute(0, 2, 3, 1)
    thought_BHWX = torch.relu(seen_BHWC @ widen_XC.mT + biases[1])
    wanted = x_BCHW.permute(0, 2, 3, 1) + thought_BHWX @ narrow_CX.mT + biases[2]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("instructions")
@torch.inference_mode()
def test_a_block_hides_nothing_that_is_no_number():
    x_BHWC = torch.zeros(1, 6, 6, 4)
    x_BHWC[0, 2, 3, 1] = torch.nan
    layers = operations.wide(torch.ones(4, 4), torch.zeros(4))

    found = operations.block(x_BHWC, 1, torch.ones(9, 4), torch.zeros(4), *layers, *layers)

    assert found[0, 1:4, 2:5].isnan().all()
    assert found.isnan().sum() == 9 * 4


@torch.inference_mode()
def test_other_kinds_of_numbers_and_those_to_learn_from_stay_with_torch():
    x = torch.randn(3, 9)
    assert operations.serves(x) == (kernels.LIBRARY is not None)
    assert not operations.serves(x.double())
    assert not operations.serves(x.bfloat16())
    with torch.inference_mode(mode=False), torch.enable_grad():
        assert not operations.serves(x)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", [1, 5, 64, 333])
def test_rows_of_8_bits_become_numbers_and_what_lies_beside_stays(width):
    draws = np.random.default_rng(0)
    values_HX = draws.integers(0, 256, (7, 3 * width + 5), np.uint8)[:, : 3 * width]
    scale_X, shift_X = draws.normal(size=(2, 3 * width)).astype(np.float32)
    out_HX = np.full((7, 3 * width + 2), 9.0, np.float32)

    kernels.feed(values_HX, scale_X, shift_X, out_HX[:, : 3 * width])

    np.testing.assert_allclose(
        out_HX[:, : 3 * width], values_HX * scale_X + shift_X, rtol=1e-5, atol=1e-5
    )
    assert (out_HX[:, 3 * width :] == 9).all()


@pytest.mark.parametrize("name", ["latent_attention", "segnet"])
@torch.inference_mode()
def test_without_a_compiler_the_same_answers_come_from_torch(name, monkeypatch):
    torch.manual_seed(0)
    model = models.build(name).eval()
    x_BCHW = torch.randn(1, model.channels, 64, 96)

    compiled = model.folded()(x_BCHW)
    monkeypatch.setattr(kernels, "LIBRARY", None)
    folded = model.folded()

    assert not any(type(part).__name__ in {"Winograd", "HalvedTwice"} for part in folded.modules())
    torch.testing.assert_close(compiled, folded(x_BCHW), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "found", ["None", "SimpleNamespace(origin='/dev/null')", "SimpleNamespace(origin=old)"]
)
def test_without_a_library_of_use_there_is_none(found):
    old = Path(ctypes.util.find_library("z") or ctypes.util.find_library("c") or "")
    script = (
        "import importlib.util as util; from types import SimpleNamespace;"
        f"old = {str(old)!r}; usual = util.find_spec;"
        "util.find_spec = lambda name, *rest:"
        f" {found} if name == 'maskfleet_kernels' else usual(name, *rest);"
        "from models.parts import kernels; print(kernels.LIBRARY)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "None\n"


def test_a_library_of_another_version_is_left_alone(monkeypatch):
    monkeypatch.setattr(kernels, "INTERFACE", kernels.INTERFACE + 1)

    assert list(kernels.known()) == []


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    "turn",
    [lambda v: v[::-1], lambda v: v[:, ::-1], lambda v: v.T[:, ::-1]],
    ids=["upside down", "mirrored", "on its side"],
)
def test_rows_of_a_picture_that_was_turned_without_a_copy_are_read_as_they_stand(turn):
    values_HX = turn(np.arange(12 * 7, dtype=np.uint8).reshape(12, 7))
    rows, width = values_HX.shape
    out_HX = np.empty((rows, width), np.float32)

    kernels.feed(values_HX, np.ones(width, np.float32), np.zeros(width, np.float32), out_HX)

    assert np.array_equal(out_HX, values_HX)


@pytest.mark.usefixtures("instructions")
def test_kernels_and_maps_that_c_would_misread_are_refused():
    conv = Winograd(torch.nn.Conv2d(16, 8, 3, padding=1))
    x_1HWC = torch.randn(1, 8, 8, 16)
    with pytest.raises(ValueError, match="for C the map must be 1024 float32"):
        conv(x_1HWC.double())
    with pytest.raises(ValueError, match="the map"):
        conv(x_1HWC.transpose(1, 2))
    with pytest.raises(ValueError, match="the kernel"):
        conv(torch.randn(1, 8, 8, 32))
    with pytest.raises(ValueError, match=r"the kernel .*bfloat16"):
        conv.bfloat16()(x_1HWC)


@pytest.mark.usefixtures("instructions")
@torch.inference_mode()
def test_a_folded_model_may_be_given_another_memory_format():
    torch.manual_seed(0)
    folded = models.build("latent_attention").eval().folded()
    x_BCHW = torch.randn(1, 3, 40, 56)

    before = folded(x_BCHW)

    assert torch.equal(folded.to(memory_format=torch.channels_last)(x_BCHW), before)


@pytest.mark.usefixtures("instructions")
@torch.inference_mode()
def test_want_of_memory_is_known_as_such_from_within_a_recording(monkeypatch):
    conv = Winograd(torch.nn.Conv2d(16, 8, 3, padding=1))
    x_1HWC = torch.randn(1, 8, 8, 16)
    recorded = torch.jit.trace(conv, x_1HWC, check_trace=False)
    full = SimpleNamespace(lanes=kernels.LIBRARY.lanes, winograd=lambda *_: kernels.NO_MEMORY)
    monkeypatch.setattr(kernels, "LIBRARY", full)

    with pytest.raises(RuntimeError) as error:
        recorded(x_1HWC)

    assert out_of_memory(error.value)
