"""A model's work recorded for the shapes that come often, and replayed without Python.

On a CPU a small picture takes some 300 operations of 50 microseconds. Between them threads wait for
each other's turn at Python (the GIL), and Python takes a tenth of the time: 47 pictures/s become 52
with one thread, 88 become 103 with two (480 x 368, 2026-11-28). A recording holds the operations
that ran, so it is only for work whose Python never looks at values (`Network.replays`); whether its
answer is the same bit for bit is asked once before it is used.

Nothing is ever loaded from a file: recordings live and die with the process.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

AFTER = 100  # pictures of a shape: recording costs as much as some six, saves a tenth or less
MOST = 6  # shapes: each recording keeps some 7 MB (2026-11-29, `plus`)
WARM_UP = 3  # calls in which torch looks at a recording before it settles how to run it

# Of reading shapes as numbers: the reason why there is a recording for each shape. Once for the
# process, because filters cannot be changed safely in threads.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # pyright: ignore[reportPrivateImportUsage]
warnings.filterwarnings("ignore", message=".*torch.jit.trace", category=DeprecationWarning)


class Replayed:
    """`grid` of a model on a CPU."""

    def __init__(self, grid: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self._grid = grid
        self._met: Counter[tuple[Any, ...]] = Counter()
        self._recorded: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, x_BCHW: Tensor, sizes_B2: Tensor | None) -> Tensor:
        """See `Segmenter.grid`."""
        if sizes_B2 is not None:
            return self._grid(x_BCHW, sizes_B2)
        shape = (*x_BCHW.shape, x_BCHW.dtype)
        recorded = self._recorded.get(shape)
        if recorded is not None:
            return recorded(x_BCHW)
        with self._lock:
            self._met[shape] += 1
            wanted = self._met[shape] == AFTER and len(self._recorded) < MOST
        answer = self._grid(x_BCHW, None)
        if wanted:
            self._record(shape, x_BCHW, answer)
        return answer

    def _alone(self, x_BCHW: Tensor) -> Tensor:
        return self._grid(x_BCHW, None)

    def _record(self, shape: tuple[Any, ...], x_BCHW: Tensor, answer: Tensor) -> None:
        # A function, not a module: of that torch would record the parts, twice as large and slow.
        recorded: Any = torch.jit.trace(self._alone, x_BCHW, check_trace=False)
        again = [recorded(x_BCHW) for _ in range(WARM_UP)]
        if torch.equal(again[-1], answer):
            self._recorded[shape] = recorded
