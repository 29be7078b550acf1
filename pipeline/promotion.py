"""May the candidate replace the champion? Arithmetic over two tables; nothing is read or written.

Both models answered the same labelled images. What is judged is the difference of their mIoU, of
counts summed over all images, under a paired bootstrap: images are drawn again with replacement,
the same ones for both models, and the difference is taken anew. The middle 95 % of these
differences are its interval.

    promote    the interval lies above the margin, and no limit is broken
    refuse     the interval lies below the margin, or a limit is broken
    undecided  neither: more labelled images would tell

A limit is broken when the whole interval lies beyond it, so noise alone does not refuse. A
candidate that answers as the champion does is refused: it is certain not to be better.

Shapes: N images, K classes, H bins of confidence, C columns of counts, B resamples, b some of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.decision import Changed, Decision, Reason, Rules, Verdict, decision_record
from pipeline.errors import RunRefused
from pipeline.scoretable import (
    BINS,
    BOUNDARY,
    CANARIES,
    EVALUATION,
    Floats,
    Scores,
    calibration_error,
    described,
    description,
    iou,
    mean,
    of_kind,
    refuse_unpaired,
)

__all__ = [
    "BINS",
    "BOUNDARY",
    "CANARIES",
    "EVALUATION",
    "Changed",
    "Decision",
    "Reason",
    "Rules",
    "Verdict",
    "decision_record",
    "described",
    "description",
    "judge",
]

Places = npt.NDArray[np.int64]

SHOWN = 20  # images that changed most
DRAWN = 2_000_000  # images drawn at a time: 16 MB of weights


def judge(
    champion: pa.Table | None,
    candidate: pa.Table,
    rules: Rules | None = None,
    canaries: pa.Table | None = None,
) -> Decision:
    """Decide between two models that answered the same images.

    Args:
        champion: its `EVALUATION`; None where there is no champion yet: then the candidate need
            reach the absolute floors only.
        candidate: its `EVALUATION`.
        rules: what it must show.
        canaries: `CANARIES` of the two models.

    Raises:
        RunRefused: the tables are of different images, labels or classes, or of another kind.
    """
    rules = rules or Rules()
    new = Scores.of(candidate, "the evaluation of the candidate")
    floors = list(_floors(new, rules))
    if champion is None:
        return _first(new, floors, rules)
    old = Scores.of(champion, "the evaluation of the champion")
    refuse_unpaired(old, new)
    return _Comparison(old, new, rules).decision([*floors, *_flips(canaries, rules)])


def _first(new: Scores, floors: list[Reason], rules: Rules) -> Decision:
    none = Reason("champion", None, None, None, note="there is none yet: absolute floors decide")
    verdict: Verdict = "refuse" if any(reason.ok is False for reason in floors) else "promote"
    return Decision(verdict, (none, *floors), (), len(new.keys), None, new.miou(), None, rules)


def _floors(new: Scores, rules: Rules) -> Iterator[Reason]:
    """What a candidate must reach, whoever is champion. Of the figures as measured."""
    if rules.least_miou is not None:
        yield Reason("mIoU at least", new.miou(), rules.least_miou, new.miou() >= rules.least_miou)
    for name, least in rules.least_iou.items():
        if name not in new.classes:
            known = ", ".join(new.classes)
            raise RunRefused(f"--rules.least-iou: there is no class {name!r} ({known})")
        value = float(new.iou_per_class()[new.classes.index(name)])
        if np.isnan(value):
            note = "not judged: labelled nowhere"
            yield Reason(f"class {name} at least", None, least, None, note=note)
        else:
            yield Reason(f"class {name} at least", value, least, value >= least)


def _flips(canaries: pa.Table | None, rules: Rules) -> Iterator[Reason]:
    """How much changes on pictures that nobody has labelled."""
    if canaries is None:
        if rules.flips is not None:
            raise RunRefused(f"--rules.flips {rules.flips} needs a table of canaries (--canaries)")
        return
    table = of_kind(canaries, CANARIES, "the table of canaries")
    changed, pixels = (int(table[name].to_numpy().sum()) for name in ("changed", "pixels"))
    if not 0 <= changed <= pixels:
        raise RunRefused(f"the table of canaries: {changed} of {pixels} pixels cannot have changed")
    rate, note = changed / max(1, pixels), f"{table.num_rows} pictures"
    ok = None if rules.flips is None else rate <= rules.flips
    yield Reason("flipped canary pixels", rate, rules.flips, ok, note=note)


@dataclass(frozen=True, slots=True)
class _Differences:
    """Candidate minus champion, in every resample or in all images once."""

    iou_BK: Floats
    miou_B: Floats
    ece_B: Floats


class _Comparison:
    """Two models on the same images."""

    def __init__(self, old: Scores, new: Scores, rules: Rules) -> None:
        self.old, self.new, self.rules = old, new, rules
        parts = [
            old.labelled_NK,
            *(part_NK for each in (old, new) for part_NK in (each.shared_NK, each.answered_NK)),
            *(part_NH for each in (old, new) for part_NH in (each.excess_NH, each.counted_NH)),
        ]
        self.columns_NC = np.concatenate(parts, axis=1)
        self.cuts = np.cumsum([part.shape[1] for part in parts])[:-1]
        self.strata = _members(old.strata)

    def decision(self, others: list[Reason]) -> Decision:
        """Resample, hold every figure against its limit, and say what follows."""
        judged = {name: place for name, place in self.strata.items() if self._enough(place)}
        resampled, miou_of_stratum = self._resampled(judged)
        once = self._differences(self.columns_NC.sum(0, keepdims=True))
        main = self._improvement(once, resampled)
        reasons = (
            main,
            self._images(),
            *self._classes(once, resampled),
            *self._strata(miou_of_stratum),
            self._calibration(once, resampled),
            self._speed(),
            *others,
        )
        verdict: Verdict = "promote" if main.ok else "undecided"
        if any(reason.ok is False for reason in reasons):
            verdict = "refuse"
        return Decision(
            verdict,
            reasons,
            self._changed(),
            len(self.old.keys),
            self.old.miou(),
            self.new.miou(),
            _share_better(resampled.miou_B),
            self.rules,
        )

    # ---------------------------------------------------------------------------------- resampling

    def _differences(self, sums_BC: Floats) -> _Differences:
        """From summed columns, in the order of `__init__`."""
        labelled_BK, shared_BK, answered_BK, shared2_BK, answered2_BK, *bins = np.split(
            sums_BC, self.cuts, axis=-1
        )
        old_BK = iou(shared_BK, answered_BK, labelled_BK)
        new_BK = iou(shared2_BK, answered2_BK, labelled_BK)
        ece_B = calibration_error(bins[2], bins[3]) - calibration_error(bins[0], bins[1])
        return _Differences(new_BK - old_BK, mean(new_BK) - mean(old_BK), ece_B)

    def _resampled(self, judged: dict[str, Places]) -> tuple[_Differences, dict[str, Floats]]:
        """The differences in every resample: of all images, and the mIoU of some strata."""
        overall: list[_Differences] = []
        miou: dict[str, list[Floats]] = {name: [] for name in judged}
        for weights_bN in self._weights():
            overall.append(self._differences(weights_bN @ self.columns_NC))
            for name, place in judged.items():
                sums_bC = weights_bN[:, place] @ self.columns_NC[place]
                miou[name].append(self._differences(sums_bC).miou_B)
        together = _Differences(
            np.concatenate([part.iou_BK for part in overall]),
            np.concatenate([part.miou_B for part in overall]),
            np.concatenate([part.ece_B for part in overall]),
        )
        return together, {name: np.concatenate(parts) for name, parts in miou.items()}

    def _weights(self) -> Iterator[Floats]:
        """How often each image is drawn, some resamples at a time."""
        n, rng = len(self.old.keys), np.random.default_rng(self.rules.seed)
        pools = list(self.strata.values()) if self.rules.stratified else []
        rest = np.setdiff1d(np.arange(n), np.concatenate([*pools, np.array([], np.int64)]))
        pools += [rest] if rest.size else []
        at_once = max(1, DRAWN // n)
        for start in range(0, self.rules.resamples, at_once):
            count = min(at_once, self.rules.resamples - start)
            drawn = [pool[rng.integers(0, pool.size, (count, pool.size))] for pool in pools]
            place_bN = np.concatenate(drawn, axis=1) + np.arange(count)[:, None] * n
            times = np.bincount(place_bN.ravel(), minlength=count * n)
            yield times.reshape(count, n).astype(np.float64)

    def _interval(self, values_B: Floats) -> tuple[float, float]:
        beyond = (1 - self.rules.confidence) / 2
        # A resample may hold nothing of a class or stratum: then it says nothing of it.
        low, high = np.quantile(values_B[~np.isnan(values_B)], [beyond, 1 - beyond])
        return float(low), float(high)

    # ---------------------------------------------------------------------------------- the limits

    def _improvement(self, once: _Differences, resampled: _Differences) -> Reason:
        low, high = self._interval(resampled.miou_B)
        margin = self.rules.margin
        ok = True if low > margin else False if high < margin else None
        if len(self.old.keys) < self.rules.images:
            ok = None
        note = f"better in {_share_better(resampled.miou_B):.1%} of the resamples"
        return Reason("mIoU", float(once.miou_B[0]), margin, ok, low, high, note)

    def _images(self) -> Reason:
        count = len(self.old.keys)
        return Reason("images", count, self.rules.images, count >= self.rules.images or None)

    def _enough(self, place: Places) -> bool:
        pixels_n = self.old.labelled_NK[place].sum(1)
        rules = self.rules
        return bool(
            (pixels_n > 0).sum() >= rules.part_images and pixels_n.sum() >= rules.part_pixels
        )

    def _classes(self, once: _Differences, resampled: _Differences) -> Iterator[Reason]:
        floor = self.rules.class_floor
        images_K, pixels_K = (self.old.labelled_NK > 0).sum(0), self.old.labelled_NK.sum(0)
        for k, name in enumerate(self.old.classes):
            images, pixels = int(images_K[k]), int(pixels_K[k])
            if images < self.rules.part_images or pixels < self.rules.part_pixels:
                note = f"not judged: {pixels} pixels in {images} images"
                yield Reason(f"class {name}", None, -floor, None, note=note)
            else:
                point, values_B = float(once.iou_BK[0, k]), resampled.iou_BK[:, k]
                yield self._fall(f"class {name}", point, values_B, floor)

    def _strata(self, miou_of_stratum: dict[str, Floats]) -> Iterator[Reason]:
        floor = self.rules.stratum_floor
        for name, place in self.strata.items():
            if name not in miou_of_stratum:
                note = f"not judged: {len(place)} images"
                yield Reason(f"stratum {name}", None, -floor, None, note=note)
            else:
                sums_1C = self.columns_NC[place].sum(0, keepdims=True)
                point = float(self._differences(sums_1C).miou_B[0])
                yield self._fall(f"stratum {name}", point, miou_of_stratum[name], floor)

    def _fall(self, title: str, point: float, values_B: Floats, floor: float) -> Reason:
        low, high = self._interval(values_B)
        return Reason(title, point, -floor, high >= -floor, low, high)

    def _calibration(self, once: _Differences, resampled: _Differences) -> Reason:
        title, limit, point = "calibration error", self.rules.calibration, float(once.ece_B[0])
        if np.isnan(point):
            return Reason(title, None, limit, None, note="not judged: no confidences")
        low, high = self._interval(resampled.ece_B)
        return Reason(title, point, limit, low <= limit, low, high)

    def _speed(self) -> Reason:
        title, limit = "seconds per megapixel", self.rules.slowdown
        parts = (self.old.seconds, self.new.seconds, self.old.pixels, self.new.pixels)
        if not all(part > 0 for part in parts):  # NaN is not
            return Reason(title, None, limit, None, note="not judged: not measured")
        ratio = (self.new.seconds / self.new.pixels) / (self.old.seconds / self.old.pixels)
        return Reason(title, ratio, limit, ratio <= limit, note="times the champion's")

    def _changed(self) -> tuple[Changed, ...]:
        old_N, new_N = self.old.miou_per_image(), self.new.miou_per_image()
        size_N = np.nan_to_num(np.abs(new_N - old_N))
        most = np.argsort(-size_N, kind="stable")[:SHOWN]
        return tuple(
            Changed(self.old.keys[n], float(old_N[n]), float(new_N[n]), float(new_N[n] - old_N[n]))
            for n in most.tolist()
            if size_N[n] > 0
        )


def _share_better(miou_B: Floats) -> float:
    return float((miou_B > 0).mean() + (miou_B == 0).mean() / 2)


def _members(strata: list[str | None]) -> dict[str, Places]:
    """The places of each stratum's images, by its name."""
    found: dict[str, list[int]] = {}
    for n, name in enumerate(strata):
        if name is not None:
            found.setdefault(name, []).append(n)
    return {name: np.array(found[name], np.int64) for name in sorted(found)}
