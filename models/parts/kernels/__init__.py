"""Passes in C (kernels.c) that torch does less well on a CPU, compiled when we are installed.

Where there was no C compiler, or what was compiled is of another version of this file, `LIBRARY` is
None, and callers do the same by torch's operations: up to twice as slow, equal up to rounding.

Here is what takes arrays, `feed` and `finish`; operations.py has what a model is made of. C runs
without the GIL, in the thread that asks.

Shapes: H W rows and columns, K classes, h w grid, X width times channels.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    Array = np.ndarray

COMPILED = "maskfleet_kernels"  # pyproject.toml
INTERFACE, NO_MEMORY, NO_NUMBER = 4, 1, 2  # kernels.c

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_HALVED_TWICE = ctypes.CFUNCTYPE(
    _INT, _POINTER, *(_INT,) * 3, *(_POINTER,) * 2, _INT, *(_POINTER,) * 2, _INT, _POINTER
)
_WINOGRAD = ctypes.CFUNCTYPE(_INT, _POINTER, *(_INT,) * 3, *(_POINTER,) * 2, _INT, _POINTER)
_FINISH = ctypes.CFUNCTYPE(
    _INT, _POINTER, _INT, *(_LONG,) * 2, *(_INT,) * 8, *(_POINTER,) * 2, *(_INT,) * 2,
    *(_POINTER,) * 4,
)  # fmt: skip
_BLOCK = ctypes.CFUNCTYPE(_INT, _POINTER, *(_INT,) * 4, _POINTER, _INT, _POINTER)
_READ = ctypes.CFUNCTYPE(_INT, _POINTER, _LONG, _INT, _POINTER, _INT, _POINTER)
_ASK = ctypes.CFUNCTYPE(_INT, _POINTER, _LONG, _INT, _POINTER, *(_INT,) * 3, _POINTER)
_CLASSIFY = ctypes.CFUNCTYPE(
    _INT, _POINTER, *(_INT,) * 4, _POINTER, *(_INT,) * 2, _POINTER, *(_INT,) * 2, ctypes.c_float,
    _POINTER,
)  # fmt: skip
_FEED = ctypes.CFUNCTYPE(_INT, _POINTER, _LONG, _INT, _LONG, *(_POINTER,) * 3, _LONG)


class Set(ctypes.Structure):
    """The passes, compiled for one set of instructions."""

    _fields_ = (
        ("lanes", _INT),
        ("feed", _FEED),
        ("halved_twice", _HALVED_TWICE),
        ("winograd", _WINOGRAD),
        ("block", _BLOCK),
        ("read", _READ),
        ("ask", _ASK),
        ("classify", _CLASSIFY),
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


def feed(values_HX: Array, scale_X: Array, shift_X: Array, out_HX: Array) -> None:
    """Rows of 8 bits times a scale plus a shift, into the rows of `out_HX`.

    Raises:
        ValueError: there is no room for all of them.
    """
    if values_HX.shape != out_HX.shape:
        raise ValueError(
            f"{values_HX.shape} values do not fit {out_HX.shape}: is a picture larger than "
            "what the model's padded_size makes of it?"
        )
    if values_HX.strides[1] != 1:  # a picture that was turned without being copied
        values_HX = np.ascontiguousarray(values_HX)
    rows, values = values_HX.shape
    LIBRARY.feed(
        values_HX.ctypes.data, values_HX.strides[0], rows, values, scale_X.ctypes.data,
        shift_X.ctypes.data, out_HX.ctypes.data, out_HX.strides[0] // out_HX.itemsize,
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
    done(said)
    return labels_1HW, certainty_1HW, counts_1K, sums_1K


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def done(said: int) -> None:
    """Raise what a pass could not do.

    Raises:
        MemoryError: there was no room for it.
    """
    if said == NO_MEMORY:
        # in a recording torch makes a RuntimeError of it, which `heap.out_of_memory` knows so
        raise MemoryError("cannot allocate memory for what a pass in C has at hand")
