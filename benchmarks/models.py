"""Plain against folded, compiled and bfloat16 forms of the models; ratios inside one run.

    python -m benchmarks.models [NAME:VARIANT...] [--sides 128 512 1024] [--threads 1 2]
    python -m benchmarks.models latent_attention:seed --forms written plain folded bf16
    python -m benchmarks.models --device cuda      # batches to saturation, CUDA graphs, peaks

`written` is the seed as its document writes it (benchmarks/tutorial.py).

Forms take turns, the best time of each counts. `labels` is the share of pixels whose class differs
from the plain form's: weights are drawn at random, which is harder than trained ones (many near
ties); `--trained` also asks the demo bundle about the pictures that ship.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import models
from benchmarks.record import record
from benchmarks.tutorial import AsWritten
from pipeline.heap import keep_freed_memory

ROOT = Path(__file__).parents[1]
CHOSEN = (
    "latent_attention:seed",
    "latent_attention:plus s",
    "latent_attention:plus m",
    "segformer:b0",
    "depict:sa tiny",
    "segnet:separable",
    "vit_segmenter:article",
    "vit_classifier:walk-through",
)
FORMS = ("plain", "folded", "compiled", "bf16")
CLASSES = 11
MOST_S = 3.0  # seconds of turns for one row; at least two turns each


@dataclass(frozen=True, slots=True)
class Form:
    """One way to run a model."""

    name: str
    model: nn.Module
    kind: torch.dtype = torch.float32


def lively(name: str, variant: str) -> nn.Module:
    """The model with random weights that give every pixel an answer of its own."""
    torch.manual_seed(0)
    config = {"classes": CLASSES, **models.about(name).variants[variant]}
    model = models.build(name, **config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.3)
    return model


def forms(model: nn.Module, wanted: list[str]) -> list[Form]:
    """The forms of a model that are asked for."""
    folded = model.folded()
    made = {
        "written": lambda: Form("written", AsWritten(model)),
        "plain": lambda: Form("plain", model),
        "folded": lambda: Form("folded", folded),
        "compiled": lambda: Form("compiled", compiled(deepcopy(folded))),
        "bf16": lambda: Form("bf16", deepcopy(folded).bfloat16(), torch.bfloat16),
    }
    return [made[name]() for name in wanted]


def compiled(model: nn.Module) -> nn.Module:
    """The same with its work compiled for the sizes it will see."""
    name = "scores" if model.task == "classify" else "grid"
    setattr(model, name, torch.compile(getattr(model, name)))
    return model


def answer(form: Form, x_BCHW: Tensor) -> Tensor:
    """Logits on the native grid (or of the picture)."""
    x_BCHW = x_BCHW.to(form.kind)
    return form.model(x_BCHW) if form.model.task == "classify" else form.model(x_BCHW, native=True)


def turns(
    calls: list[Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Best seconds of each call; they take turns, so that a busy moment hurts all."""
    best = [float("inf")] * len(calls)
    start = time.perf_counter()
    for turn in itertools.count():
        if turn >= 3 and time.perf_counter() - start > MOST_S:
            return best
        for i, call in enumerate(calls):
            began = clock()
            call()
            if turn:  # the first one warms up, or compiles
                best[i] = min(best[i], clock() - began)
    raise AssertionError


@torch.inference_mode()
def on_cpu(chosen: list[str], sides: list[int], threads: list[int], wanted: list[str]) -> list[str]:
    """Milliseconds of the plain form, and how many times faster the others are."""
    keep_freed_memory()
    rows = [
        f"| model | side | threads | {wanted[0]}, ms | {' | '.join(wanted[1:])} | labels differ |",
        f"|---|---|---|---|{'---|' * len(wanted)}",
    ]
    for entry in chosen:
        model = lively(*entry.split(":"))
        made = forms(model, wanted)
        for side, count in itertools.product(sides, threads):
            torch.set_num_threads(count)
            x_1CHW = torch.randn(1, model.channels, side, side)
            labels = [answer(form, x_1CHW).argmax(1) for form in made]
            seconds = turns([lambda f=form, x=x_1CHW: answer(f, x) for form in made])
            differ = ", ".join(
                f"{form.name} {100 * (found != labels[0]).float().mean():.2g} %"
                for form, found in zip(made[1:], labels[1:], strict=True)
            )
            ratios = " | ".join(f"x{seconds[0] / s:.2f}" for s in seconds[1:])
            rows.append(
                f"| {entry} | {side} | {count} | {1000 * seconds[0]:.1f} | {ratios} | {differ} |"
            )
            print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def on_cuda(chosen: list[str], sides: list[int], wanted: list[str]) -> list[str]:
    """Pictures a second by batch size, up to where more does not help, and the card's own peaks."""
    peak = {kind: matmul_peak(kind) for kind in (torch.float32, torch.bfloat16)}
    rows = [
        (
            f"{torch.cuda.get_device_name()}: matmul {peak[torch.float32] / 1e12:.0f} TFLOP/s fp32,"
            f" {peak[torch.bfloat16] / 1e12:.0f} bf16; copy {copy_peak() / 1e9:.0f} GB/s"
        ),
        "",
        "| model | side | form | best batch | pictures/s | share of the matmul peak | CUDA graph |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry, side in itertools.product(chosen, sides):
        name, variant = entry.split(":")
        model = lively(name, variant).cuda()
        gflop = flops(model, side)
        for form in forms(model, wanted):
            best, at, graph = 0.0, 1, 0.0
            for batch in (1, 2, 4, 8, 16, 32, 64, 128):
                x_BCHW = torch.randn(batch, model.channels, side, side, device="cuda")
                x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
                try:
                    rate = batch / cuda_seconds(lambda f=form, x=x_BCHW: answer(f, x))
                except torch.OutOfMemoryError:
                    break
                if rate < 1.03 * best:
                    break
                best, at = rate, batch
                graph = batch / graph_seconds(lambda f=form, x=x_BCHW: answer(f, x))
            share = best * gflop / peak[form.kind]
            rows.append(
                f"| {entry} | {side} | {form.name} | {at} | {best:.0f} | {100 * share:.0f} %"
                f" | x{graph / best:.2f} |"
            )
            print(rows[-1], flush=True)
    return rows


def flops(model: nn.Module, side: int) -> float:
    """Operations of one picture."""
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counter:
        model(torch.zeros(1, model.channels, side, side, device="cuda"))
    return float(counter.get_total_flops())


def cuda_seconds(call: Callable[[], object]) -> float:
    """Best seconds of a call on the card."""
    best = float("inf")
    for turn in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn > 2:
            best = min(best, time.perf_counter() - began)
    return best


def graph_seconds(call: Callable[[], object]) -> float:
    """Best seconds of the same work replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return cuda_seconds(graph.replay)


def matmul_peak(kind: torch.dtype, side: int = 8192) -> float:
    """Operations a second of a large product."""
    a, b = torch.randn(2, side, side, device="cuda", dtype=kind)
    return 2 * side**3 / cuda_seconds(lambda: a @ b)


def copy_peak(nbytes: int = 2**30) -> float:
    """Bytes a second of a copy on the card, read and written."""
    a = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * nbytes / cuda_seconds(lambda: b.copy_(a))


@torch.inference_mode()
def trained(wanted: list[str]) -> list[str]:
    """How many labels of the demo bundle differ on the pictures that ship."""
    model, bundle = models.load_bundle(ROOT / "models" / "demo")
    made = forms(model, wanted)
    pictures = sorted((ROOT / "docs" / "pictures" / "loose").glob("*.png"))
    differ, pixels = dict.fromkeys(wanted, 0), 0
    mean, std = np.float32(bundle.input.mean), np.float32(bundle.input.std)
    for path in pictures:
        with Image.open(path) as picture:
            values_HWC = np.asarray(picture.convert("RGB"), np.float32) / 255
        values_HWC = values_HWC[:256, :256]  # one size: compiling takes its time
        x_1CHW = torch.from_numpy((values_HWC - mean) / std).permute(2, 0, 1)[None]
        labels = {f.name: f.model(x_1CHW.to(f.kind)).float().argmax(1) for f in made}
        pixels += labels["plain"].numel()
        for name, found in labels.items():
            differ[name] += int((found != labels["plain"]).sum())
    said = ", ".join(f"{name} {100 * differ[name] / pixels:.3f} %" for name in wanted[1:])
    return ["", f"Demo bundle, {len(pictures)} pictures, {pixels} pixels, labels differ: {said}"]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=CHOSEN)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trained", action="store_true")
    given = parser.parse_args()
    chosen = list(given.models)
    if given.device == "cuda":
        rows = on_cuda(chosen, given.sides, given.forms)
    else:
        rows = on_cpu(chosen, given.sides, given.threads, given.forms)
    record("forms of the models", rows + (trained(given.forms) if given.trained else []))


if __name__ == "__main__":
    main()
