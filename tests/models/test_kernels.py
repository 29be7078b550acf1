"""Passes in C beside what torch says, by every set of instructions known here; and without any."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

import models
from models.parts import kernels

SETS = list(kernels.known())


@pytest.fixture(params=SETS or [None], ids=[f"{each.lanes} lanes" for each in SETS] or ["none"])
def instructions(request, monkeypatch):
    if request.param is None:
        pytest.skip("nothing was compiled: no C compiler when this was installed")
    monkeypatch.setattr(kernels, "LIBRARY", request.param)


def test_they_are_compiled_wherever_the_tests_run():
    assert SETS, "pip found no C compiler when it installed this; see docs/speed.md"


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
@pytest.mark.parametrize(("shape", "dim"), [((1, 40), 1), ((1, 5, 40), 1)])
@pytest.mark.parametrize("place", [0, 4, 21, 39])
@torch.inference_mode()
def test_a_softmax_hides_nothing_that_is_no_number(shape, dim, place):
    x = torch.zeros(shape)
    x[..., place] = torch.nan

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


def test_a_folder_without_the_compiled_file_works_too():
    script = (
        "import importlib.util as util; found = util.find_spec;"
        "util.find_spec = lambda name, *rest: None if '_compiled' in name else found(name, *rest);"
        "from models.parts import kernels; print(kernels.LIBRARY)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "None\n"
    assert importlib.util.find_spec("models.parts.kernels._compiled") is not None
