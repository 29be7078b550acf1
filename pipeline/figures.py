"""Figures of an evaluation: what follows from the counts of its pictures, for people and programs.

Means are over the classes that are labelled, as the gate has them (pipeline/scoretable.py).

Shapes: N images, K classes, L bins of confidence.
"""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from models.training.scores import Boundary, Confusion
from pipeline.ontology import Ontology
from pipeline.records import Array
from pipeline.scoretable import BINS, calibration_error, iou, mean


@dataclass(frozen=True, slots=True)
class About:
    """What was measured, and where."""

    model: str
    task: str
    """`segment`; `classify`: then what is counted below are pictures, not pixels."""
    bundle: str
    """Its hash."""
    data: str
    split: str
    evalset: str
    """Hash of the pictures, masks and keys (pipeline/labels.py)."""
    ontology: str
    """Hash of the classes."""
    border: float
    """How far a border may be off: pixels, or below 1 a share of the diagonal."""
    on: str
    """`process`, `local`, or the address of a cluster."""
    device: str
    seconds: float
    """Of the clock on the wall, from the first picture to the last."""


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """How well one class is found; None where it does not occur."""

    name: str
    iou: float | None
    dice: float | None
    accuracy: float | None
    """The share of its pixels that are found."""
    boundary_f: float | None
    labelled: int
    """Pixels."""
    answered: int


@dataclass(frozen=True, slots=True)
class StratumFigures:
    """The pictures of one stratum."""

    images: int
    miou: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How good the model is; shares are of 1, None where nothing tells."""

    about: About
    images: int
    rejected: int
    miou: float | None
    pixel_accuracy: float | None
    mean_accuracy: float | None
    mean_dice: float | None
    boundary_f: float | None
    calibration_error: float | None
    classes: tuple[ClassFigures, ...]
    strata: dict[str, StratumFigures]
    confusion: tuple[tuple[int, ...], ...]
    """Pixels: rows are what they are, columns what they were called."""
    megapixels: float
    model_seconds_per_megapixel: float | None
    """Of one core, or of the GPU."""
    seconds_per_megapixel: float | None
    """Of all workers together, everything counted."""


def figures_of(
    table: pa.Table, rejected: int, confusion: Confusion, ontology: Ontology, about: About
) -> Figures:
    """Sums of counts, and what follows from them.

    Args:
        table: one row per picture (`pipeline.scoring.ROWS`).
        rejected: pictures without a row.
        confusion: of all of them.
        ontology: names of the classes.
        about: what it was.
    """
    megapixels = sum(table["pixels"].to_pylist()) / 1e6
    border = _borders(table, confusion.classes, about.border)
    iou_K, dice_K, recall_K = confusion.iou_K(), confusion.dice_K(), confusion.recall_K()
    f_K = border.f_K()
    return Figures(
        about=about,
        images=table.num_rows,
        rejected=rejected,
        miou=_known(confusion.mean_found(iou_K)),
        pixel_accuracy=_known(confusion.accuracy()),
        mean_accuracy=_known(confusion.mean_found(recall_K)),
        mean_dice=_known(confusion.mean_found(dice_K)),
        boundary_f=_known(border.mean_f()),
        calibration_error=_known(_calibration(table)),
        classes=tuple(
            ClassFigures(
                name,
                _known(float(iou_K[k])),
                _known(float(dice_K[k])),
                _known(float(recall_K[k])),
                _known(float(f_K[k])),
                int(confusion.labelled_K()[k]),
                int(confusion.answered_K()[k]),
            )
            for k, name in enumerate(ontology.names)
        ),
        strata=_strata(table, confusion.classes),
        confusion=tuple(tuple(row) for row in confusion.counts_KK.tolist()),
        megapixels=megapixels,
        model_seconds_per_megapixel=_per(sum(table["seconds"].to_pylist()), megapixels),
        seconds_per_megapixel=_per(about.seconds, megapixels),
    )


def _known(figure: float) -> float | None:
    return None if math.isnan(figure) else figure


def _per(seconds: float, megapixels: float) -> float | None:
    return seconds / megapixels if megapixels else None


def _matrix(table: pa.Table, name: str, width: int) -> Array:
    return np.array(table[name].to_pylist(), np.float64).reshape(-1, width)


def _borders(table: pa.Table, classes: int, width: float) -> Boundary:
    border = Boundary(classes, width)
    for name in ("labelled", "found", "answered", "right"):
        sum_K = _matrix(table, f"boundary_{name}", classes).sum(0)
        setattr(border, f"{name}_K", sum_K.astype(np.int64))
    return border


def _calibration(table: pa.Table) -> float:
    names = ("bin_confidence", "bin_correct", "bin_count")
    sure_L, right_L, count_L = (_matrix(table, name, BINS).sum(0) for name in names)
    return float(calibration_error(sure_L - right_L, count_L))


def _strata(table: pa.Table, classes: int) -> dict[str, StratumFigures]:
    names = ("intersection", "answered", "labelled")
    counts_3NK = np.stack([_matrix(table, name, classes) for name in names])
    stratum_N = np.array(table["stratum"].to_pylist(), object)
    found = {}
    for stratum in sorted({name for name in stratum_N.tolist() if name is not None}):
        chosen_3nK = counts_3NK[:, stratum_N == stratum]
        miou = float(mean(iou(*chosen_3nK.sum(1))))
        found[stratum] = StratumFigures(chosen_3nK.shape[1], _known(miou))
    return found
