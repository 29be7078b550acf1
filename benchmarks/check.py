"""Whether anything has become slower: ratios of one run against those that were recorded.

    python -m benchmarks.check            # fails where a ratio has fallen; some three minutes
    python -m benchmarks.check --record   # takes today's as the recorded ones

Each is a ratio of two things measured side by side here, so that a slower machine, or hour, moves
both. What varies all the same is the tolerance of each. How wide a core computes moves some, so
each width has records of its own. It uses pictures that ship.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.batching import compared, web
from benchmarks.corpora import pictures, repeated
from benchmarks.limit import Staged, limits_of, run_once, stage_costs
from benchmarks.models import answer, forms, lively, turns
from benchmarks.record import commit, machine
from benchmarks.storage import measured
from models.parts import kernels
from pipeline.batch import STEPS
from pipeline.create import read_bundle
from pipeline.finishing import Finisher
from pipeline.heap import keep_freed_memory

RECORDED = Path(__file__).parent / "ratios.json"
SHIPPED = Path(__file__).parents[1] / "docs" / "pictures" / "loose"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Something that should stay high."""

    says: str
    measure: Callable[[], float]
    tolerance: float
    """Share that it may fall below the recorded value."""


def masks() -> list[np.ndarray]:
    """Masks as nets make them: large areas, ragged borders."""
    draws = np.random.default_rng(0)
    y, x = np.mgrid[:360, :480]
    made = []
    for _ in range(64):
        waves = sum(np.sin((a * y + b * x) / 40 + c) for a, b, c in draws.normal(0, 1, (4, 3)))
        noise = draws.normal(0, 0.15, waves.shape)
        made.append(np.digitize(waves + noise, [-1.5, -0.5, 0.5, 1.5]).astype(np.uint8))
    return made


def codec() -> float:
    return measured(masks(), repeats=5).codec


def over_zarr() -> float:
    found = measured(masks(), repeats=3).by_cpu
    return found["fragment, built"] / found["zarr-python, sharded"]


@torch.inference_mode()
def faster(base: str, form: str, model: str, side: int = 512) -> float:
    keep_freed_memory()
    torch.set_num_threads(1)
    net = lively(*model.split(":"))
    x_1CHW = torch.randn(1, net.channels, side, side)
    slow, fast = turns(
        [lambda f=f: answer(f, x_1CHW) for f in forms(net, [base, form])], time.thread_time
    )
    return slow / fast


@torch.inference_mode()
def finishing() -> float:
    keep_freed_memory()
    torch.set_num_threads(1)
    scores_Khw = torch.randn(11, 90, 120, generator=torch.Generator().manual_seed(0)) * 4
    about = scores_Khw, 0, (90, 120), (360, 480), (0, 360), 480, None, False
    in_c, kernels.LIBRARY = kernels.LIBRARY, None
    by_torch = Finisher(list(range(11)), torch.device("cpu"))
    kernels.LIBRARY = in_c
    ours = Finisher(list(range(11)), torch.device("cpu"))
    calls = [lambda f=f: f.finished(*about) for f in (by_torch, ours)]
    slow, fast = turns(calls, time.thread_time)
    return slow / fast


def near_the_limit() -> float:
    segmenter = Staged(*read_bundle("demo"), "cpu")
    files = pictures([SHIPPED])
    with tempfile.TemporaryDirectory() as folder:
        source = repeated([SHIPPED], 400, Path(folder) / "pictures")
        stage_costs(files, segmenter, 2**17)
        costs = [stage_costs(files, segmenter, 2**17) for _ in range(3)]
        run = run_once(source, Path(folder) / "run", "demo", "process")
    limits, _ = limits_of(costs, len(os.sched_getaffinity(0)))
    limit = min(limits.values())
    return run["steady"] * run["megapixels"] / limit


def calls_saved() -> float:
    ways = compared(web(), 2**21, 512, [STEPS])
    ours, others = ways[f"buckets, {STEPS} steps an octave (ours)"], ways["16 of one exact shape"]
    return others.passes / ours.passes


def not_padding() -> float:
    return 1 - compared(web(), 2**21, 64, [STEPS])[f"buckets, {STEPS} steps an octave (ours)"].waste


RATIOS = {
    "calls_saved": Ratio("passes by exact shape / by buckets, sizes as on the web", calls_saved, 0),
    "not_padding": Ratio("share of a batch's pixels that are tiles", not_padding, 0),
    "codec": Ratio("a fragment's object / its codec alone, CPU seconds", codec, 0.08),
    "over_zarr": Ratio("a fragment's object / zarr-python's shard", over_zarr, 0.2),
    "folded_seed": Ratio(
        "the document's net: folded / as written, 512 px",
        lambda: faster("written", "folded", "latent_attention:seed"),
        0.12,
    ),
    "folded_segformer": Ratio(
        "SegFormer-B0: folded / plain, 512 px",
        lambda: faster("plain", "folded", "segformer:b0"),
        0.12,
    ),
    "folded_plus": Ratio(
        "the shipped net: folded / plain, 512 px",
        lambda: faster("plain", "folded", "latent_attention:plus s"),
        0.12,
    ),
    "finishing": Ratio("scores to labels: by torch's operations / in C", finishing, 0.2),
    "near_the_limit": Ratio("first to last fragment / work-bound limit", near_the_limit, 0.1),
}


def width() -> str:
    """Of this core, as far as our own passes use it."""
    return "none" if kernels.LIBRARY is None else f"{kernels.LIBRARY.lanes} lanes"


def main() -> int:
    """Measure, compare, say; 1 where something has become slower."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", nargs="+", choices=RATIOS, default=list(RATIOS))
    given = parser.parse_args()
    records = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    known = records.setdefault(width(), {"ratios": {}})
    found, slower = {}, []
    for name in given.only:
        ratio = RATIOS[name]
        found[name] = round(ratio.measure(), 3)
        before = known["ratios"].get(name)
        low = before is not None and found[name] < before * (1 - ratio.tolerance)
        slower += [name] if low else []
        verdict = "SLOWER" if low else "ok" if before is not None else "new"
        print(
            f"{verdict:<6} {name}: {found[name]:.2f}, recorded {before}; {ratio.says}", flush=True
        )
    if given.record:
        known |= {"commit": commit(), "machine": machine(), "ratios": known["ratios"] | found}
        RECORDED.write_text(f"{json.dumps(records, indent=1)}\n")
        return 0
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
