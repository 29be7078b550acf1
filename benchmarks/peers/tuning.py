"""The best settings of each peer, found by a sweep and kept in settings.json beside this file.

One knob after the other, each at the best of those before: what runs in parallel, then the way in,
then the batch. The fastest whole command wins, since all have the same to start, among those
whose pixels are ours (Daft's own decoder has others).
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from benchmarks.peers.entrants import Corpus, Entrant
from benchmarks.peers.same_work import TOLERANCE, Counts, differing
from benchmarks.record import machine

FILE = Path(__file__).parent / "settings.json"
CORES = len(os.sched_getaffinity(0))
BATCHES = (1, 4, 16, 32)
LIKE = {"shards": "street"}
"""Corpora of the same pictures: what was found on one serves the other until it is tuned."""

Knobs = dict[str, str | int]


def start_of(peer: str) -> Knobs:
    """Where the sweep begins, and what is used where there was none."""
    if peer in {"ray_data", "daft_frame"}:
        return {"workers": CORES, "threads": 1, "reader": "bytes", "batch": 8}
    if peer == "torch_loader":
        return {"workers": 1, "threads": CORES, "batch": 8}
    return {"threads": CORES, "batch": 8}


def variations(peer: str) -> Iterator[list[Knobs]]:
    """For each knob its other values."""
    if peer in {"ray_data", "daft_frame"}:
        yield [{"workers": 1, "threads": CORES}]
        yield [{"reader": "images"}]
    elif peer == "torch_loader":
        yield [{"threads": 1}, {"workers": CORES}, {"workers": CORES, "threads": 1}]
    else:
        yield [{"threads": 1}]
    yield [{"batch": batch} for batch in BATCHES]


def tuned(peer: str, form: str, corpus: Corpus, given: Namespace, ours: Counts) -> list[str]:
    """Sweep, keep the best that did the same work; rows of a table of all that was tried."""
    tried: list[tuple[float, float, Knobs]] = []

    def attempt(knobs: Knobs) -> None:
        finish = Entrant(peer, form, tuple(knobs.items())).run(corpus, given.model)
        tried.append((finish.whole, differing(ours, finish.counts), knobs))

    def best() -> Knobs:
        same = [each for each in tried if each[1] <= TOLERANCE]
        if not same:
            raise SystemExit(f"{peer} {form} does other work than ours on {corpus.name}: {tried}")
        return max(same, key=itemgetter(0))[2]

    attempt(start_of(peer))
    for others in variations(peer):
        chosen = best()
        for other in others:
            if (knobs := {**chosen, **other}) not in [each[2] for each in tried]:
                attempt(knobs)
    _keep(f"{corpus.name} {form} {peer}", best())
    return [
        f"| {peer} | {form} | {_shown(knobs)} | {rate:.2f}{_mark(knobs is best(), share)} "
        f"| {share:.1e} |"
        for rate, share, knobs in tried
    ]


def _mark(best: bool, share: float) -> str:
    if share > TOLERANCE:
        return ", other work"
    return " **best**" if best else ""


def best_known(peer: str, form: str, corpus: str) -> Knobs:
    """The settings to race with."""
    known = _known()["best"]
    for kind in (corpus, LIKE.get(corpus)):
        if found := known.get(f"{kind} {form} {peer}"):
            return found
    return start_of(peer)


def _known() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {"best": {}}


def _keep(name: str, knobs: Knobs) -> None:
    best = {**_known()["best"], name: knobs}
    told = {"found_by": "python -m benchmarks.peers --tune", "on": machine()}
    FILE.write_text(json.dumps({**told, "best": dict(sorted(best.items()))}, indent=2) + "\n")


def _shown(knobs: Knobs) -> str:
    return " ".join(f"{name}={value}" for name, value in knobs.items())
