"""Small labelled folders that grow, and trainings of a few steps on them."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests import runs
from tests.pictures import blobs, encoded

CLASSES = [
    {"id": 0, "name": "background", "color": [0, 0, 0]},
    {"id": 1, "name": "nucleus", "color": [255, 170, 0]},
]
STEPS = 12
MODEL = "latent_attention:plus xs"
RECIPE = (
    *("--set", f"length={STEPS}", "--set", "rate.warmup=2", "--set", "batch=4"),
    *("--set", "augment.size=[32,32]", "--every", "4", "--threads", "1"),
)
WORDS = ("--model", MODEL, *RECIPE)
LEARNS = (
    *("--set", "length=24", "--set", "rate.peak=0.03", "--set", "average=0.5"),
    *("--every", "24"),
)
"""After `WORDS`: a second later the model is right about nine pixels of ten."""


def folder(place: Path, pictures: int) -> Path:
    """So many labelled pictures, numbered."""
    (place / "images").mkdir(parents=True)
    (place / "masks").mkdir()
    (place / "ontology.json").write_text(json.dumps({"classes": CLASSES}))
    add(place, range(pictures))
    return place


def add(place: Path, numbers: Iterable[int], *, shuffled: bool = False) -> None:
    """More of them; shuffled ones call dark what is bright."""
    for number in numbers:
        pixels_HWC = blobs(40, 48, seed=number)
        bright_HW = pixels_HWC.mean(2) > 60
        mask_HW = (bright_HW ^ shuffled).astype(np.uint8)
        (place / "images" / f"{number:04}.png").write_bytes(encoded(pixels_HWC, "PNG"))
        (place / "masks" / f"{number:04}.png").write_bytes(encoded(mask_HW, "PNG"))


VIT = (
    *("--model", "vit_classifier", "--set", "model.channels=3", "--set", "model.image=[32,32]"),
    *("--set", "model.patch=8", "--set", "model.width=16", "--set", "model.depth=1"),
)
CLASSIFIES = (*VIT, *RECIPE)
"""After the data and a registry: a classifier, trained for as many steps."""
LEARNS_CLASSES = ("--set", "length=40", "--set", "rate.peak=0.01", "--set", "average=0.5")
"""After `CLASSIFIES`: half a second later it tells bright pictures from dark ones."""


def whole_pictures(numbers: Iterable[int]) -> dict[str, tuple[str, bytes]]:
    """Dark pictures with bright blobs and bright ones with dark blobs: class and PNG by name."""
    found = {}
    for number in numbers:
        pixels_HWC = blobs(40 + number % 3, 48, seed=number)
        name, shown = ("bright", 255 - pixels_HWC) if number % 2 else ("dark", pixels_HWC)
        found[f"{number:04}.png"] = name, encoded(shown, "PNG")
    return found


def class_folders(place: Path, pictures: int) -> Path:
    """So many pictures in the folders of their classes."""
    for key, (name, data) in whole_pictures(range(pictures)).items():
        (place / name).mkdir(parents=True, exist_ok=True)
        (place / name / key).write_bytes(data)
    return place


@contextmanager
def quickly() -> Iterator[None]:
    """Look for a pixel budget with pictures as small as ours: at full size that costs a third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.infer.PROBE_SIDE", 32)
        yield


_nursery = multiprocessing.get_context("forkserver")  # which has everything imported: tests.runs


def killed(
    main: Callable[[list[str]], int], words: Sequence[object], call: str, ending: str
) -> None:
    """Run a command in a process that dies just before it makes this call on such a path."""
    given = [str(word) for word in words]
    process = _nursery.Process(target=_die, args=(main, given, call, ending, dict(os.environ)))
    process.start()
    process.join(runs.PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL


def _die(
    main: Callable[[list[str]], int],
    words: list[str],
    call: str,
    ending: str,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    runs.signal_before(call, ending, signal.SIGKILL)
    with quickly():
        os._exit(main(words))
