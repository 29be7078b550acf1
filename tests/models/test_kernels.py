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

import models
from models.parts import kernels
from models.parts.conv3x3 import Winograd
from pipeline.heap import out_of_memory


def test_they_are_compiled():
    sets = list(kernels.known())
    if not sets and "CI" not in os.environ:
        pytest.skip("nothing was compiled: no C compiler when this was installed")
    assert sets


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((2, 5, 10_801), -1), ((2, 16, 300), 1), ((1, 7), 1), ((4, 1, 3), 1), ((3, 2, 5, 129), 2)],
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 1000.0])
@torch.inference_mode()
def test_a_softmax_is_torchs(shape, dim, spread):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spread

    found = kernels.softmax(x, dim)

    # 2^x of x / ln 2, whose rounding grows with x
    torch.testing.assert_close(found, x.softmax(dim), rtol=1e-5 + 1e-7 * spread, atol=1e-30)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("shape", "dim"), [((1, 40), 1), ((1, 5, 40), 1), ((2, 0), 1)])
@pytest.mark.parametrize("place", [0, 4, 21, 39])
@torch.inference_mode()
def test_a_softmax_hides_nothing_that_is_no_number(shape, dim, place):
    x = torch.zeros(shape)
    x[..., place : place + 1] = torch.nan

    assert torch.equal(kernels.softmax(x, dim).isnan(), x.softmax(dim).isnan())


@torch.inference_mode()
def test_a_softmax_of_other_kinds_of_numbers_is_torchs_own():
    x = torch.randn(3, 9)
    for other in (x.double(), x.bfloat16()):
        assert torch.equal(kernels.softmax(other, 1), other.softmax(1))
    assert torch.equal(kernels.softmax(x[:, ::2], 1), kernels.softmax(x[:, ::2].contiguous(), 1))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", [1, 5, 64, 333])
def test_rows_of_8_bits_become_numbers_and_what_lies_beside_stays(width):
    draws = np.random.default_rng(0)
    values_HX = draws.integers(0, 256, (7, 3 * width + 5), np.uint8)[:, : 3 * width]
    scale_X, shift_X = draws.normal(size=(2, 3 * width)).astype(np.float32)
    out_HX = torch.full((7, 3 * width + 2), 9.0)

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

    assert not any(type(part).__name__ in {"Winograd", "Halved"} for part in folded.modules())
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
    out_HX = torch.empty(rows, width)

    kernels.feed(values_HX, np.ones(width, np.float32), np.zeros(width, np.float32), out_HX)

    assert np.array_equal(out_HX.numpy(), values_HX)


@pytest.mark.usefixtures("instructions")
def test_kernels_and_maps_that_c_would_misread_are_refused():
    conv = Winograd(torch.nn.Conv2d(16, 8, 3, padding=1))
    x_HWC = torch.randn(8, 8, 16)
    with pytest.raises(ValueError, match="the map of a convolution in C must be 1024 float32"):
        conv(x_HWC.double(), 0, 8)
    with pytest.raises(ValueError, match="the map"):
        conv(x_HWC.transpose(0, 1), 0, 8)
    with pytest.raises(ValueError, match="the kernel"):
        conv(torch.randn(8, 8, 32), 0, 8)
    with pytest.raises(ValueError, match=r"the kernel .*bfloat16"):
        conv.bfloat16()(x_HWC, 0, 8)


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
    x_HWC = torch.randn(8, 8, 16)
    recorded = torch.jit.trace(lambda x: conv(x, 0, 8), x_HWC, check_trace=False)
    full = SimpleNamespace(lanes=kernels.LIBRARY.lanes, winograd=lambda *_: kernels.NO_MEMORY)
    monkeypatch.setattr(kernels, "LIBRARY", full)

    with pytest.raises(RuntimeError) as error:
        recorded(x_HWC)

    assert out_of_memory(error.value)
