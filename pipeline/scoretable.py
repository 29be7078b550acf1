"""What a model scored on labelled images: a row of counts per image, and figures of their sums.

Counts add up, figures do not: whoever wants the IoU of some images sums their rows first.

Shapes: N images, K classes, H bins of confidence, x any number of leading axes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import RunRefused
from pipeline.keys import printable

Floats = npt.NDArray[np.float64]

BINS = 15  # of confidence, equally wide (Guo et al. 2017, section 2)

_COUNTS, _SUMS = pa.list_(pa.int64()), pa.list_(pa.float64())

EVALUATION = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("stratum", pa.string()),
        pa.field("intersection", _COUNTS, nullable=False),
        pa.field("labelled", _COUNTS, nullable=False),
        pa.field("answered", _COUNTS, nullable=False),
        pa.field("bin_count", _COUNTS, nullable=False),
        pa.field("bin_confidence", _SUMS, nullable=False),
        pa.field("bin_correct", _COUNTS, nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("pixels", pa.int64(), nullable=False),
    ]
)
"""One row per labelled image; ignored pixels count nowhere. Per class: pixels that label and answer
share, pixels of the label, pixels of the answer. Per bin of confidence: pixels, sum of confidences,
pixels answered correctly. `seconds` of the model (NaN: not measured) and `pixels` of the picture
make the speed."""

BOUNDARY = pa.schema(
    [
        pa.field("boundary_labelled", _COUNTS, nullable=False),
        pa.field("boundary_found", _COUNTS, nullable=False),
        pa.field("boundary_answered", _COUNTS, nullable=False),
        pa.field("boundary_right", _COUNTS, nullable=False),
    ]
)
"""Columns an evaluation may have besides, per class: boundary pixels of the label and how many of
them lie near one of the answer; the same of the answer. Reported, not judged."""

CANARIES = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("changed", pa.int64(), nullable=False),
        pa.field("pixels", pa.int64(), nullable=False),
    ]
)
"""One row per unlabelled picture: pixels whose class the two models see differently, and all."""

_ABOUT = b"maskfleet"


def described(table: pa.Table, bundle: str, evalset: str, classes: Sequence[str]) -> pa.Table:
    """An evaluation that says of which bundle and evaluation set it is (two hashes)."""
    about = {"bundle": bundle, "evalset": evalset, "classes": list(classes)}
    return table.replace_schema_metadata({_ABOUT: json.dumps(about).encode()})


def description(table: pa.Table) -> dict[str, Any]:
    """What `described` said, or nothing."""
    return json.loads((table.schema.metadata or {}).get(_ABOUT, b"{}"))


def of_kind(table: pa.Table, schema: pa.Schema, what: str) -> pa.Table:
    """The columns of a schema.

    Args:
        table: from a file, so it may be anything.
        schema: one of the above.
        what: "the evaluation of the candidate".

    Raises:
        RunRefused: if it is another table, or an empty one.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise RunRefused(f"{what} has no column {', '.join(missing)}; is it another table?")
    try:
        table = table.select(schema.names).cast(schema.with_metadata(table.schema.metadata))
    except (pa.ArrowException, ValueError) as error:
        raise RunRefused(f"{what} cannot be used: {error}") from error
    if not table.num_rows:
        raise RunRefused(f"{what} has no rows")
    return table


# -------------------------------------------------------------------------------------- as arrays


@dataclass(frozen=True, slots=True)
class Scores:
    """An evaluation as arrays, in order of the keys."""

    keys: list[str]
    strata: list[str | None]
    classes: list[str]
    """Names, or numbers where the table gives no names."""
    labelled_NK: Floats
    shared_NK: Floats
    answered_NK: Floats
    counted_NH: Floats
    excess_NH: Floats
    """Sum of the confidences beyond the pixels that were right."""
    seconds: float
    pixels: int

    @classmethod
    def of(cls, table: pa.Table, what: str) -> "Scores":
        """Read an evaluation.

        Raises:
            RunRefused: if it is none, or its counts cannot be.
        """
        table = of_kind(table, EVALUATION, what).sort_by("key")
        keys = table["key"].to_pylist()
        twice = next((a for a, b in pairwise(keys) if a == b), None)
        if twice is not None:
            raise RunRefused(f"{what} has {printable(twice)} twice; evaluate again")
        per_class = {name: _matrix(table, name, what) for name in EVALUATION.names[2:5]}
        per_bin = {name: _matrix(table, name, what) for name in EVALUATION.names[5:8]}
        for group in (per_class, per_bin):
            if len({part.shape for part in group.values()}) > 1:
                raise RunRefused(f"{what}: {', '.join(group)} have different lengths")
        shared_NK, labelled_NK, answered_NK = per_class.values()
        _refuse_impossible(keys, shared_NK, np.minimum(labelled_NK, answered_NK), what)
        if not labelled_NK.any():
            raise RunRefused(f"{what}: no pixel is labelled; check masks and ignore index")
        return cls(
            keys,
            table["stratum"].to_pylist(),
            _names(table, labelled_NK.shape[1], what),
            labelled_NK,
            shared_NK,
            answered_NK,
            per_bin["bin_count"],
            per_bin["bin_confidence"] - per_bin["bin_correct"],
            float(table["seconds"].to_numpy().sum()),
            int(table["pixels"].to_numpy().sum()),
        )

    def iou_per_class(self) -> Floats:
        """IoU of each class over all images."""
        return iou(self.shared_NK.sum(0), self.answered_NK.sum(0), self.labelled_NK.sum(0))

    def miou(self) -> float:
        """Mean IoU over all images, of the classes that are labelled."""
        return float(mean(self.iou_per_class()))

    def miou_per_image(self) -> Floats:
        """Mean IoU of each image, of the classes that are labelled in it."""
        return mean(iou(self.shared_NK, self.answered_NK, self.labelled_NK))


def refuse_unpaired(old: Scores, new: Scores) -> None:
    """Refuse two evaluations that are not of the same images, labels, classes and bins.

    Raises:
        RunRefused: naming some of what differs.
    """
    alone = sorted(set(old.keys) ^ set(new.keys))
    if alone:
        shown = ", ".join(printable(key) for key in alone[:5])
        more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
        raise RunRefused(
            "champion and candidate were evaluated on different images: only one of them on "
            f"{shown}{more}; evaluate both on the same evaluation set"
        )
    if old.classes != new.classes:
        raise RunRefused(
            f"champion and candidate have different classes ({', '.join(old.classes)}; "
            f"{', '.join(new.classes)}) and cannot be compared"
        )
    if old.counted_NH.shape != new.counted_NH.shape:
        raise RunRefused("champion and candidate have different bins of confidence; evaluate again")
    differ_N = (old.labelled_NK != new.labelled_NK).any(1)
    for n, key in enumerate(old.keys):
        if differ_N[n] or old.strata[n] != new.strata[n]:
            raise RunRefused(
                f"{printable(key)} has another label or stratum for the champion than for the "
                "candidate; evaluate both on the same evaluation set"
            )


def _matrix(table: pa.Table, name: str, what: str) -> Floats:
    lists = pa.concat_arrays(table[name].chunks)
    widths = sorted(set(lists.value_lengths().to_pylist()))
    values = lists.flatten()
    if len(widths) != 1 or not widths[0] or values.null_count:
        raise RunRefused(f"{what}: {name} must hold as many numbers for every image")
    return values.to_numpy().reshape(len(lists), -1).astype(np.float64)


def _refuse_impossible(keys: list[str], shared_NK: Floats, most_NK: Floats, what: str) -> None:
    wrong_N = ((shared_NK > most_NK) | (shared_NK < 0)).any(1)
    if wrong_N.any():
        key = printable(keys[int(wrong_N.argmax())])
        raise RunRefused(f"{what}: {key} shares more pixels with its label than either has")


def _names(table: pa.Table, count: int, what: str) -> list[str]:
    names = description(table).get("classes") or [str(k) for k in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise RunRefused(f"{what} counts {count} classes and names {', '.join(names)}")
    return names


# ---------------------------------------------------------------------------------------- figures


def iou(shared_xK: Floats, answered_xK: Floats, labelled_xK: Floats) -> Floats:
    """Intersection over union of each class that is labelled; NaN for the others."""
    there_xK = labelled_xK > 0
    union_xK = np.where(there_xK, labelled_xK + answered_xK - shared_xK, 1)
    return np.where(there_xK, shared_xK / union_xK, np.nan)


def mean(values_xK: Floats) -> Floats:
    """Mean over the last axis without NaNs; NaN where there is nothing else."""
    there_xK = ~np.isnan(values_xK)
    count_x = there_xK.sum(-1)
    total_x = np.where(there_xK, values_xK, 0).sum(-1)
    return np.where(count_x > 0, total_x / np.maximum(count_x, 1), np.nan)


def calibration_error(excess_xH: Floats, counted_xH: Floats) -> Floats:
    """Expected calibration error: how far confidence lies from accuracy; NaN without pixels."""
    total_x = counted_xH.sum(-1)
    distance_x = np.abs(excess_xH).sum(-1)
    return np.where(total_x > 0, distance_x / np.maximum(total_x, 1), np.nan)
