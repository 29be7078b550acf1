"""Layers in C, as operations of torch: recordings (replay.py) hold them.

Shapes: B batch, H W rows and columns, C channels, F features; N kernels of n numbers in all; T
tokens, K classes, P heads times experts or a whole number of panels, O outputs, X thoughts.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.parts import kernels
from models.parts.kernels import done
from models.parts.strips import pays

if TYPE_CHECKING:
    from collections.abc import Iterator


def serves(x: Tensor) -> bool:
    """Whether what comes of x may go through C: where that pays, and of float32."""
    return kernels.LIBRARY is not None and x.dtype == torch.float32 and pays(x)


def packed(kernel_NCF: Tensor) -> Tensor:
    """Kernels as C reads them, each panel of features of all, zeros behind the last: kernel_n."""
    panel = 2 * kernels.LIBRARY.lanes
    padded = pad(kernel_NCF, (0, -kernel_NCF.shape[2] % panel))
    return padded.unflatten(2, (-1, panel)).permute(2, 0, 1, 3).to(torch.float32).flatten()


def packed_bias(bias_F: Tensor | None, features: int) -> Tensor:
    """A bias with zeros behind the last feature; zeros alone where there is none."""
    bias_F = torch.zeros(features) if bias_F is None else bias_F.detach().cpu()
    return pad(bias_F.float(), (0, _in_panels(features) - features)).contiguous()


def wide(weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer's weight as C reads it for rows of inputs, and its bias: weight_IP, bias_P.

    Zeros behind the last output up to a multiple of a panel, where there is one.
    """
    outputs = len(weight_OI)
    more = 0 if kernels.LIBRARY is None else _in_panels(outputs) - outputs
    return pad(weight_OI.mT, (0, more)).contiguous(), pad(bias_O, (0, more)).contiguous()


def _in_panels(n: int) -> int:
    """So many, and up to a multiple of a panel."""
    return n + -n % (2 * kernels.LIBRARY.lanes)


def _halved_twice(
    x_BHWC: Tensor,
    first_n: Tensor,
    first_bias: Tensor,
    between: int,
    second_n: Tensor,
    second_bias: Tensor,
    features: int,
) -> Tensor:
    """Two 3 x 3 convolutions, each with its 2 x 2 maximum and ReLU behind it: out_BhwF.

    Kernels are transformed ones, the first of columns alone; they are packed, as are biases.
    """
    batch, height, width, channels = x_BHWC.shape
    _check(x_BHWC, first_n, first_bias, 18 * channels, between)
    _check(x_BHWC, second_n, second_bias, 36 * between, features)
    out_BhwF = x_BHWC.new_empty(batch, height // 4, width // 4, features)
    first = first_n.data_ptr(), first_bias.data_ptr(), between
    second = second_n.data_ptr(), second_bias.data_ptr(), features
    about = height, width, channels, *first, *second
    for x_HWC, out_hwF in _each(x_BHWC, out_BhwF):
        done(kernels.LIBRARY.halved_twice(x_HWC, *about, out_hwF))
    return out_BhwF


def _winograd(x_BHWC: Tensor, kernel_n: Tensor, bias_F: Tensor, features: int) -> Tensor:
    """A 3 x 3 convolution: out_BHWF. The kernel is a transformed one, packed, as is the bias."""
    batch, height, width, channels = x_BHWC.shape
    _check(x_BHWC, kernel_n, bias_F, 36 * channels, features)
    out_BHWF = x_BHWC.new_empty(batch, height, width, features)
    about = height, width, channels, kernel_n.data_ptr(), bias_F.data_ptr(), features
    for x_HWC, out_HWF in _each(x_BHWC, out_BHWF):
        done(kernels.LIBRARY.winograd(x_HWC, *about, out_HWF))
    return out_BHWF


def _check(x_BHWC: Tensor, kernel_n: Tensor, bias_F: Tensor, terms: int, features: int) -> None:
    """Whether C may read as many numbers as it will: kernels may have come from elsewhere."""
    padded = _in_panels(features)
    kernel, bias = (kernel_n, terms * padded), (bias_F, padded)
    _in_a_row(kernel=kernel, bias=bias, map=(x_BHWC, x_BHWC.numel()))


def _in_a_row(**parts: tuple[Tensor, int]) -> None:
    for name, (numbers, wanted) in parts.items():
        kind, there = numbers.dtype, numbers.numel()
        if kind != torch.float32 or there != wanted or not numbers.is_contiguous():
            raise ValueError(
                f"for C the {name} must be {wanted} float32 in a row, it is "
                f"{there} {kind} by {numbers.stride()}; fold the model again on this machine"
            )


def _block(
    x_BHWC: Tensor,
    spread: int,
    window_9C: Tensor,
    bias_C: Tensor,
    widen_CX: Tensor,
    widen_X: Tensor,
    narrow_XC: Tensor,
    narrow_C: Tensor,
) -> Tensor:
    """What was there, plus narrow ReLU(widen window(x)); layers as `wide` gives them: out_BHWC."""
    _, height, width, channels = x_BHWC.shape
    inside = len(narrow_XC)
    wide_channels, wide_inside = _in_panels(channels), _in_panels(inside)
    _in_a_row(
        x_BHWC=(x_BHWC, x_BHWC.numel()),
        window_9C=(window_9C, 9 * channels),
        bias_C=(bias_C, channels),
        widen_CX=(widen_CX, channels * wide_inside),
        widen_X=(widen_X, wide_inside),
        narrow_XC=(narrow_XC, inside * wide_channels),
        narrow_C=(narrow_C, wide_channels),
    )
    parts = window_9C, bias_C, widen_CX, widen_X, narrow_XC, narrow_C
    about = height, width, channels, spread, _struct(*map(_at, parts)), inside
    out_BHWC = torch.empty_like(x_BHWC)
    for x_HWC, out_HWC in _each(x_BHWC, out_BHWC):
        done(kernels.LIBRARY.block(x_HWC, *about, out_HWC))
    return out_BHWC


def _read(x_BTF: Tensor, query_PF: Tensor) -> Tensor:
    """Every query's mean of the tokens, weighted by the softmax of its scores: mean_BPF."""
    batch, tokens, features = x_BTF.shape
    rows = len(query_PF)
    _in_a_row(x_BTF=(x_BTF, x_BTF.numel()), query_PF=(query_PF, rows * features))
    mean_BPF = x_BTF.new_empty(batch, rows, features)
    about = tokens, features, query_PF.data_ptr(), rows
    for x_TF, mean_PF in _each(x_BTF, mean_BPF):
        done(kernels.LIBRARY.read(x_TF, *about, mean_PF))
    return mean_BPF


def _ask(
    x_BTF: Tensor,
    score_BPF: Tensor,
    score_BP1: Tensor,
    answer_BOP: Tensor,
    bias_O: Tensor,
    heads: int,
) -> Tensor:
    """What tokens are told by the experts that they ask: told_BOT."""
    batch, tokens, features = x_BTF.shape
    outputs, experts = answer_BOP.shape[1], answer_BOP.shape[2] // heads
    _in_a_row(x_BTF=(x_BTF, x_BTF.numel()))
    asking = _asking(batch, features, score_BPF, score_BP1, answer_BOP, bias_O)
    told_BOT = x_BTF.new_empty(batch, outputs, tokens)
    for (x_TF, told_OT), ask in zip(_each(x_BTF, told_BOT), asking, strict=True):
        about = tokens, features, ask, heads, experts, outputs
        done(kernels.LIBRARY.ask(x_TF, *about, told_OT))
    return told_BOT


def _classify(
    fine_BhwC: Tensor,
    lateral_CP: Tensor,
    bias_P: Tensor,
    half_BhwF: Tensor,
    quarter_BhwF: Tensor,
    score_BPF: Tensor,
    score_BP1: Tensor,
    answer_BFP: Tensor,
    bias_F: Tensor,
    heads: int,
    widen_XF: Tensor,
    widen_X: Tensor,
    head_KF: Tensor,
    narrow_KX: Tensor,
    bias_K: Tensor,
    epsilon: float,
) -> Tensor:
    """Scores_BKhw of cells that ask, normalised, keep what they are, and think, normalised again.

    cell = lateral fine + half there + quarter there (bilinear); known = cell + told;
    scores = head known + narrow ReLU(widen normalised(known)). Lateral and its bias are as `wide`
    gives them; `half` has half as many rows and columns as `fine`, `quarter` a quarter.

    Raises:
        ValueError: parts do not fit each other.
    """
    batch, height, width, own = fine_BhwC.shape
    if height % 4 or width % 4 or not height * width:
        raise ValueError(f"a map of {height} x {width} has no halves and quarters")
    features, (thoughts, _), classes = half_BhwF.shape[3], widen_XF.shape, len(head_KF)
    padded = _in_panels(features)
    _in_a_row(
        fine_BhwC=(fine_BhwC, batch * height * width * own),
        lateral_CP=(lateral_CP, own * padded),
        bias_P=(bias_P, padded),
        half_BhwF=(half_BhwF, batch * (height // 2) * (width // 2) * features),
        quarter_BhwF=(quarter_BhwF, batch * (height // 4) * (width // 4) * features),
        widen_XF=(widen_XF, thoughts * features),
        widen_X=(widen_X, thoughts),
        head_KF=(head_KF, classes * features),
        narrow_KX=(narrow_KX, classes * thoughts),
        bias_K=(bias_K, classes),
    )
    lateral = _at(lateral_CP), _at(bias_P)
    asking = _asking(batch, features, score_BPF, score_BP1, answer_BFP, bias_F)
    thinking = _struct(*map(_at, (widen_XF, widen_X, head_KF, narrow_KX, bias_K)))
    sizes = heads, answer_BFP.shape[2] // heads, thinking, thoughts, classes, epsilon
    scores_BKhw = fine_BhwC.new_empty(batch, classes, height, width)
    items = _each(fine_BhwC, half_BhwF, quarter_BhwF, scores_BKhw)
    for (fine, half, quarter, scores_Khw), ask in zip(items, asking, strict=True):
        maps = _struct(fine, *lateral, half, quarter)
        about = height, width, own, features, ask, *sizes
        done(kernels.LIBRARY.classify(maps, *about, scores_Khw))
    return scores_BKhw


def _asking(
    batch: int,
    features: int,
    score_BPF: Tensor,
    score_BP1: Tensor,
    answer_BOP: Tensor,
    bias_O: Tensor,
) -> list[Any]:
    """A `struct asking` for each item."""
    _, outputs, rows = answer_BOP.shape
    _in_a_row(
        score_BPF=(score_BPF, batch * rows * features),
        score_BP1=(score_BP1, batch * rows),
        answer_BOP=(answer_BOP, batch * outputs * rows),
        bias_O=(bias_O, outputs),
    )
    bias = _at(bias_O)
    return [_struct(*item, bias) for item in _each(score_BPF, score_BP1, answer_BOP)]


def _each(*batches: Tensor) -> Iterator[tuple[int, ...]]:
    """Where the first item of every batch lies, then the second, and so on.

    Not by tensors of the items: of a small picture those took a hundredth of the time.
    """
    starts = [batch.data_ptr() for batch in batches]
    steps = [batch.stride(0) * batch.element_size() for batch in batches]
    for number in range(batches[0].shape[0]):
        yield tuple(start + number * step for start, step in zip(starts, steps, strict=True))


def _at(part: Tensor) -> int:
    return part.data_ptr()


def _struct(*addresses: int) -> Any:  # noqa: ANN401 - an array of a length of its own
    """What a C struct of pointers is."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


_OPERATIONS = torch.library.Library("maskfleet", "DEF")
_ASKED = "Tensor score, Tensor score_bias, Tensor answer, Tensor answer_bias, int heads"
for signature, work in {
    "halved_twice(Tensor x, Tensor first, Tensor first_bias, int between, Tensor second, "
    "Tensor second_bias, int features)": _halved_twice,
    "winograd(Tensor x, Tensor kernel, Tensor bias, int features)": _winograd,
    "block(Tensor x, int spread, Tensor window, Tensor window_bias, Tensor widen, "
    "Tensor widen_bias, Tensor narrow, Tensor narrow_bias)": _block,
    "read(Tensor x, Tensor query)": _read,
    f"ask(Tensor x, {_ASKED})": _ask,
    f"classify(Tensor fine, Tensor lateral, Tensor bias, Tensor half, Tensor quarter, {_ASKED}, "
    "Tensor widen, Tensor widen_bias, Tensor head, Tensor narrow, Tensor head_bias, "
    "float epsilon)": _classify,
}.items():
    _OPERATIONS.define(f"{signature} -> Tensor")
    _OPERATIONS.impl(signature.split("(", maxsplit=1)[0], work, "CPU")
_OURS = torch.ops.maskfleet
halved_twice, winograd, block = _OURS.halved_twice, _OURS.winograd, _OURS.block
read, ask, classify = _OURS.read, _OURS.ask, _OURS.classify
