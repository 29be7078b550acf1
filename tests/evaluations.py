"""Evaluations of models that were never built: labels and answers as counts, drawn by a seed."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.promotion import BINS, EVALUATION

CLASSES = 4
PER_CLASS = 4000  # labelled pixels of a class in an image, at most


def labels(images: int, classes: int = CLASSES, seed: int = 0) -> np.ndarray:
    """Labelled pixels per image and class; every class misses in some images."""
    rng = np.random.default_rng([seed, 1])
    drawn = rng.integers(200, PER_CLASS, (images, classes))
    return np.where(rng.random((images, classes)) < 0.2, 0, drawn)


def confusion(labelled: np.ndarray, recall: float, seed: int) -> np.ndarray:
    """Pixels [image, label, answer] of a model that is right for this share, more or less."""
    rng = np.random.default_rng([seed, 2])
    images, classes = labelled.shape
    share = np.clip(rng.normal(recall, 0.06, (images, classes)), 0, 1)
    right = rng.binomial(labelled, share)
    counts = rng.multinomial(labelled - right, np.full(classes, 1 / classes))
    counts[:, range(classes), range(classes)] += right
    return counts


def mended(counts: np.ndarray, share: float) -> np.ndarray:
    """The same model with this share of its errors corrected (or made, where negative)."""
    classes = counts.shape[1]
    own = np.eye(classes, dtype=bool)
    if share >= 0:
        moved = np.where(own, 0, (counts * share).astype(np.int64))
        better = counts - moved
        better[:, own] += moved.sum(2)
        return better
    worse = np.where(own, (counts * (1 + share)).astype(np.int64), counts)
    lost = (counts - worse).sum(2)
    worse[:, range(classes), [(k + 1) % classes for k in range(classes)]] += lost
    return worse


def evaluation(
    counts: np.ndarray,
    strata: Sequence[str | None] | None = None,
    overconfident: float | np.ndarray = 0.0,
    seconds: float = 0.1,
) -> pa.Table:
    """The table of a model with this confusion."""
    images, classes, _ = counts.shape
    own = range(classes)
    pixels, right = counts.sum((1, 2)), counts[:, own, own].sum(1)
    place = BINS - 3
    in_bins = np.zeros((images, BINS), np.int64)
    in_bins[:, place] = 1
    return pa.table(
        {
            "key": [f"{n:05}.png" for n in range(images)],
            "stratum": list(strata) if strata else [None] * images,
            "intersection": counts[:, own, own].tolist(),
            "labelled": counts.sum(2).tolist(),
            "answered": counts.sum(1).tolist(),
            "bin_count": (in_bins * pixels[:, None]).tolist(),
            "bin_confidence": (in_bins * (right + overconfident * pixels)[:, None]).tolist(),
            "bin_correct": (in_bins * right[:, None]).tolist(),
            "seconds": [seconds] * images,
            "pixels": pixels.tolist(),
        },
        schema=EVALUATION,
    )


def model(images: int = 200, recall: float = 0.8, seed: int = 0, labels_seed: int = 0) -> pa.Table:
    """An evaluation in one word."""
    return evaluation(confusion(labels(images, seed=labels_seed), recall, seed))
