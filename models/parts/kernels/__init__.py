"""Passes in C (kernels.c) that torch does less well on a CPU, compiled when we are installed.

Where there was no C compiler, or what was compiled is of another version of this file, `LIBRARY` is
None, and callers do the same by torch's operations: up to twice as slow, equal up to rounding.

`halved`, `winograd` and `softmax` are operations of torch (`torch.ops.maskfleet`), so that
recordings (replay.py) hold them. C runs without the GIL, in the thread that asks.

Shapes: H W rows and columns, C channels, F features, P a panel of features; K classes; h w grid;
N kernels of n numbers in all.
"""

from __future__ import annotations

import ctypes
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    Array = np.ndarray

COMPILED = "maskfleet_kernels"  # pyproject.toml
INTERFACE, NO_MEMORY, NO_NUMBER = 1, 1, 2  # kernels.c

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_HALVED = ctypes.CFUNCTYPE(_INT, _POINTER, *(_INT,) * 3, *(_POINTER,) * 2, *(_INT,) * 3, _POINTER)
_WINOGRAD = ctypes.CFUNCTYPE(_INT, _POINTER, *(_INT,) * 3, *(_POINTER,) * 2, *(_INT,) * 4, _POINTER)
_FINISH = ctypes.CFUNCTYPE(
    _INT, _POINTER, _INT, *(_LONG,) * 2, *(_INT,) * 8, *(_POINTER,) * 2, *(_INT,) * 2,
    *(_POINTER,) * 4,
)  # fmt: skip
_SOFTMAX = ctypes.CFUNCTYPE(_INT, _POINTER, *(_LONG,) * 3, _POINTER)
_FEED = ctypes.CFUNCTYPE(_INT, _POINTER, _LONG, _INT, _LONG, *(_POINTER,) * 3, _LONG)


class Set(ctypes.Structure):
    """The passes, compiled for one set of instructions."""

    _fields_ = (
        ("lanes", _INT),
        ("feed", _FEED),
        ("halved", _HALVED),
        ("winograd", _WINOGRAD),
        ("softmax", _SOFTMAX),
        ("finish", _FINISH),
    )


def known() -> Iterator[Any]:
    """The sets that this core knows, the best first; none where nothing of use was compiled."""
    spec = find_spec(COMPILED)
    if spec is None or spec.origin is None:
        return
    try:
        library = ctypes.CDLL(spec.origin)
        if ctypes.c_int.in_dll(library, "maskfleet_interface").value != INTERFACE:
            return
        give = library.maskfleet_set
    except (OSError, AttributeError, ValueError):  # of another kind of machine, cut short, too old
        return
    give.restype = ctypes.POINTER(Set)
    number = 0
    while found := give(number):
        yield found.contents
        number += 1


LIBRARY: Any = next(known(), None)
"""The best `Set`, or None."""


def packed(kernel_NCF: Tensor) -> Tensor:
    """Kernels as C reads them, panel by panel, zeros behind the last feature: kernel_n."""
    panel = 2 * LIBRARY.lanes
    padded = torch.nn.functional.pad(kernel_NCF, (0, -kernel_NCF.shape[2] % panel))
    return padded.unflatten(2, (-1, panel)).transpose(1, 2).to(torch.float32).flatten()


def packed_bias(bias_F: Tensor | None, features: int) -> Tensor:
    """A bias with zeros behind the last feature; zeros alone where there is none."""
    bias_F = torch.zeros(features) if bias_F is None else bias_F.detach().cpu()
    panel = 2 * LIBRARY.lanes
    return torch.nn.functional.pad(bias_F.float(), (0, -features % panel)).contiguous()


def _halved(
    x_HWC: Tensor, kernel_n: Tensor, bias_F: Tensor, features: int, top: int, rows: int
) -> Tensor:
    """Rows `top` to `top + rows` of a 3 x 3 convolution, its 2 x 2 maximum, and ReLU: out_HWF."""
    height, width, channels = x_HWC.shape
    _check(x_HWC, kernel_n, bias_F, 9 * channels, features)
    out_HWF = x_HWC.new_empty(rows, width // 2, features)
    about = height, width, channels, kernel_n.data_ptr(), bias_F.data_ptr(), features
    _done(LIBRARY.halved(x_HWC.data_ptr(), *about, top, rows, out_HWF.data_ptr()))
    return out_HWF


def _winograd(
    x_HWC: Tensor,
    kernel_n: Tensor,
    bias_F: Tensor,
    features: int,
    top: int,
    rows: int,
    halve: bool,
) -> Tensor:
    """A 3 x 3 convolution, or its 2 x 2 maximum and ReLU, of `rows` rows from `top` on: out_HWF.

    Beyond the map lie zeros. The kernel is a transformed one, packed, as is the bias.
    """
    height, width, channels = x_HWC.shape
    _check(x_HWC, kernel_n, bias_F, 36 * channels, features)
    shape = (rows // 2, width // 2) if halve else (rows, width)
    out_HWF = x_HWC.new_empty(*shape, features)
    about = height, width, channels, kernel_n.data_ptr(), bias_F.data_ptr(), features
    _done(LIBRARY.winograd(x_HWC.data_ptr(), *about, top, rows, int(halve), out_HWF.data_ptr()))
    return out_HWF


def _check(x_HWC: Tensor, kernel_n: Tensor, bias_F: Tensor, terms: int, features: int) -> None:
    """Whether C may read as many numbers as it will: kernels may have come from elsewhere."""
    padded = features + -features % (2 * LIBRARY.lanes)
    sizes = {"kernel": (kernel_n, terms * padded), "bias": (bias_F, padded)}
    for name, (numbers, wanted) in {**sizes, "map": (x_HWC, x_HWC.numel())}.items():
        kind, there = numbers.dtype, numbers.numel()
        if kind != torch.float32 or there != wanted or not numbers.is_contiguous():
            raise ValueError(
                f"the {name} of a convolution in C must be {wanted} float32 in a row, it is "
                f"{there} {kind} by {numbers.stride()}; fold the model again on this machine"
            )


def _softmax(x: Tensor, dim: int) -> Tensor:
    """What torch's gives, of contiguous float32."""
    out = torch.empty_like(x)
    dim %= x.ndim
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    LIBRARY.softmax(x.data_ptr(), outer, x.shape[dim], inner, out.data_ptr())
    return out


def feed(values_HX: Array, scale_X: Array, shift_X: Array, out_HX: Tensor) -> None:
    """Rows of 8 bits times a scale plus a shift, into the rows of `out_HX`."""
    if values_HX.strides[1] != 1:  # a picture that was turned without being copied
        values_HX = np.ascontiguousarray(values_HX)
    rows, values = values_HX.shape
    LIBRARY.feed(
        values_HX.ctypes.data, values_HX.strides[0], rows, values, scale_X.ctypes.data,
        shift_X.ctypes.data, out_HX.data_ptr(), out_HX.stride(0),
    )  # fmt: skip


def finish(
    scores_Khw: Tensor,
    g0: int,
    cells: tuple[int, int],
    size: tuple[int, int],
    span: tuple[int, int],
    width: int,
    blank_1HW: Tensor | None,
    ids_K: Tensor | None,
    fill: int,
    kind: torch.dtype,
    *,
    confidence: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor] | None:
    """What `pipeline.finishing.Finished` holds of one picture; None if a score is no number.

    Args:
        scores_Khw: float32 grid rows from g0 on.
        g0: the grid row of the first.
        cells: rows and columns of the whole grid.
        size: height and width over which they are stretched, in pixels.
        span: first pixel row, and the row after the last.
        width: pixels of a row that are wanted.
        blank_1HW: True where those rows have no data.
        ids_K: int32, the classes' labels; None: 0, 1, ...
        fill: the label where there is no data.
        kind: uint8 or int32, of the labels.
        confidence: whether every pixel's is wanted.
    """
    scores_Khw = scores_Khw if scores_Khw.stride(2) == 1 else scores_Khw.contiguous()
    shape = 1, span[1] - span[0], width
    labels_1HW = torch.empty(shape, dtype=kind)
    certainty_1HW = torch.empty(shape, dtype=torch.uint8) if confidence else None
    counts_1K = torch.empty(1, len(scores_Khw), dtype=torch.int64)
    sums_1K = torch.empty(1, len(scores_Khw), dtype=torch.float64)
    blank_1HW = None if blank_1HW is None else blank_1HW.contiguous()
    said = LIBRARY.finish(
        scores_Khw.data_ptr(), len(scores_Khw), *scores_Khw.stride()[:2], g0, *cells, *size, *span,
        width, _pointer(blank_1HW), _pointer(ids_K), fill, labels_1HW.element_size(),
        labels_1HW.data_ptr(), _pointer(certainty_1HW), counts_1K.data_ptr(), sums_1K.data_ptr(),
    )  # fmt: skip
    if said == NO_NUMBER:
        return None
    _done(said)
    return labels_1HW, certainty_1HW, counts_1K, sums_1K


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _done(said: int) -> None:
    if said == NO_MEMORY:
        # in a recording torch makes a RuntimeError of it, which `heap.out_of_memory` knows so
        raise MemoryError("cannot allocate memory for a convolution's tiles or a row of scores")


_OPERATIONS = torch.library.Library("maskfleet", "DEF")
_OPERATIONS.define(
    "halved(Tensor x, Tensor kernel, Tensor bias, int features, int top, int rows) -> Tensor"
)
_OPERATIONS.define(
    "winograd(Tensor x, Tensor kernel, Tensor bias, int features, int top, int rows, bool halve)"
    " -> Tensor"
)
_OPERATIONS.define("softmax(Tensor x, int dim) -> Tensor")
for name, work in {"halved": _halved, "winograd": _winograd, "softmax": _softmax}.items():
    _OPERATIONS.impl(name, work, "CPU")
halved, winograd = torch.ops.maskfleet.halved, torch.ops.maskfleet.winograd


def softmax(x: Tensor, dim: int) -> Tensor:
    """As torch's, to infer; in C where that can be."""
    here = LIBRARY is not None and x.device.type == "cpu" and x.dtype == torch.float32
    if not here or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x.softmax(dim)
    return torch.ops.maskfleet.softmax(x.contiguous(), dim)
