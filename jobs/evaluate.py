"""Measure a model on labelled pictures: mIoU, Dice, boundary F, calibration, speed."""

import sys

import tyro

from jobs import ended
from pipeline.errors import EXIT_DONE, EXIT_REJECTIONS
from pipeline.evaluate import EvaluateConfig, Evaluation, as_json, evaluate
from pipeline.figures import Figures
from pipeline.keys import printable

CONFUSION = 12  # classes whose confusion matrix fits a terminal; --json has all


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, say.

    Args:
        arguments: the command line without the program's name; default: this process's.

    Returns:
        0 done, 3 done with pictures rejected, 2 refused.
    """
    return ended(lambda: _run(parsed(arguments)))


def parsed(arguments: list[str] | None) -> EvaluateConfig:
    """The config that the command line says."""
    return tyro.cli(EvaluateConfig, prog="maskfleet evaluate", args=arguments)


def _run(config: EvaluateConfig) -> int:
    found = evaluate(config) if config.on == "process" else _on_ray(config)
    figures = found.figures
    if config.as_json:
        sys.stdout.write(as_json(figures))
    else:
        lines = [*_text(figures), *_rejected(found.rejected.to_pylist())]
        sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_REJECTIONS if figures.rejected else EXIT_DONE


def _on_ray(config: EvaluateConfig) -> Evaluation:
    from pipeline.cluster import OnRay  # Ray takes a second to import

    place = OnRay(config.on, config.compute)
    try:
        return evaluate(config, workers=place)
    finally:
        place.close()


def _text(figures: Figures) -> list[str]:
    about = figures.about
    width = max(len(one.name) for one in figures.classes)
    width = min(40, max(width, len("class")))
    counted = "pictures" if about.task == "classify" else "pixels"
    head = f"{'class':<{width}}  {'IoU':>6} {'Dice':>6} {'found':>6} {'border':>6}  {counted:>12}"
    rows = [
        f"{printable(one.name, width):<{width}}  {_share(one.iou)} {_share(one.dice)} "
        f"{_share(one.accuracy)} {_share(one.boundary_f)}  {one.labelled:>12,}"
        for one in figures.classes
    ]
    means = (figures.miou, figures.mean_dice, figures.mean_accuracy, figures.boundary_f)
    total = sum(one.labelled for one in figures.classes)
    mean = f"{'mean':<{width}}  {' '.join(map(_share, means))}  {total:>12,}"
    border = (
        f"{about.border:g} px" if about.border >= 1 else f"{100 * about.border:g} % of the diagonal"
    )
    return [
        (
            f"{about.model} ({about.bundle[:12]}) on {figures.images} pictures of {about.data}, "
            f"{about.split} ({about.evalset[:12]})"
        ),
        "",
        head,
        *rows,
        mean,
        "",
        (
            f"{'' if about.task == 'classify' else 'pixel '}accuracy "
            f"{_share(figures.pixel_accuracy).strip()} %, calibration error "
            f"{_share(figures.calibration_error).strip()} %"
            + ("" if about.task == "classify" else f", borders within {border}")
        ),
        *_strata(figures),
        *_confusion(figures, width),
        (
            f"{figures.megapixels:.1f} MP in {about.seconds:.1f} s: "
            f"{_seconds(figures.seconds_per_megapixel)} s per MP; the "
            f"model alone {_seconds(figures.model_seconds_per_megapixel)} s on one {about.device}"
        ),
    ]


def _strata(figures: Figures) -> list[str]:
    return [
        f"stratum {printable(name, 40)}: mIoU {_share(one.miou).strip()} % of {one.images} pictures"
        for name, one in figures.strata.items()
    ]


def _confusion(figures: Figures, width: int) -> list[str]:
    """Shares of each class's pixels by what they were called."""
    if len(figures.classes) > CONFUSION:
        return []
    names = [one.name for one in figures.classes]
    head = " ".join(f"{printable(name, 6):>6}" for name in names)
    rows = [
        f"{printable(name, width):<{width}}  "
        + " ".join(_share(count / sum(row) if sum(row) else None) for count in row)
        for name, row in zip(names, figures.confusion, strict=True)
    ]
    return ["", f"{'called':>{width}}  {head}", *rows, ""]


def _rejected(rows: list[dict[str, str]]) -> list[str]:
    return [
        f"rejected: {printable(row['key'])}: {row['station']}: {row['reason']}" for row in rows[:10]
    ] + ([f"… and {len(rows) - 10} more rejected"] if len(rows) > 10 else [])


def _share(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{100 * value:6.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
