"""Work on a GPU captured as CUDA graphs for the batches that come often.

Between pixels and labels lie some hundred operations of a few microseconds. Python takes as long to
start each, and threads that decode and compress want Python meanwhile: a GPU that could do 8,000
small pictures a second did 900 (2026-11-29, H200). A graph is started at once, with all of them.

It does the operations that ran when it was captured, so it is only for work whose Python never
looks at values (`Network.captures`), and is asked once, with other values, before it is used.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.heap import out_of_memory

Work = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""From tensors of the device to tensors of the device."""

AFTER = 4  # batches of a kind: capturing costs as much as some ten
MOST = 24  # graphs: they share their memory, for one works at a time
OFF = 1e-3  # share of a tensor's values, or of its greatest: how far a graph may be off


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """What was captured, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    given: list[torch.Tensor]
    made: list[torch.Tensor]

    def __call__(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """Answers: copies, for the next call of any graph overwrites what this one has made."""
        for own, each in zip(self.given, given, strict=True):
            own.copy_(each)
        self.graph.replay()
        return [each.clone() for each in self.made]


class Captured:
    """Does work, by a graph where it can; for one thread at a time, always on one stream."""

    def __init__(self) -> None:
        self._met: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, Graph] = {}
        self._memory: Any = None

    def __call__(self, kind: Hashable, given: list[torch.Tensor], work: Work) -> list[torch.Tensor]:
        """What the work makes of what it is given.

        Args:
            kind: what else the work depends on; with the shapes of what it is given that is all.
            given: tensors on the device.
            work: asks for no value.
        """
        kind = kind, *((each.shape, each.dtype) for each in given)
        if kind in self._graphs:
            return self._graphs[kind](given)
        # Also where it is captured: what cuDNN keeps for a thread it takes at the thread's first
        # call, and cannot while one captures.
        answer = work(given)
        self._met[kind] += 1
        if self._met[kind] == AFTER and len(self._graphs) < MOST:
            graph = self._captured(given, work)
            if graph is not None:
                self._graphs[kind] = graph
        return answer

    def forget(self) -> None:
        """Let go of all graphs, and of the memory that they hold; they are captured again."""
        self._met.clear()
        self._graphs.clear()
        self._memory = None

    def _captured(self, given: list[torch.Tensor], work: Work) -> Graph | None:
        """The graph, if there is memory for it and it does what the work does."""
        try:
            graph, own = torch.cuda.CUDAGraph(), [each.clone() for each in given]
            with torch.cuda.graph(
                graph,
                pool=self._memory,
                stream=torch.cuda.current_stream(),
                capture_error_mode="thread_local",  # other threads may do as they like meanwhile
            ):
                made = work(own)
            captured = Graph(graph, own, made)
            others = [own[0].flip(1), *own[1:]]
            alike = zip(captured(others), work(others), strict=True)
            if not all(_off(one, other) <= OFF for one, other in alike):
                return None
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        self._memory = self._memory or graph.pool()
        return captured


def _off(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.is_floating_point():
        return float((one - other).abs().max() / other.abs().max().clamp(min=1e-9))
    return float((one != other).float().mean())
