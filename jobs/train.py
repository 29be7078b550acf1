"""Train a model on labelled pictures and publish it in a registry; the same command goes on."""

import sys

import tyro

from jobs import ended
from pipeline.errors import EXIT_DONE
from pipeline.train import Trained, train
from pipeline.train_config import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, say.

    Args:
        arguments: the command line without the program's name; default: this process's.

    Returns:
        0 published, 2 refused or the loss diverged, 4 stopped before the end: run it again.
    """
    return ended(lambda: _run(parsed(arguments)))


def parsed(arguments: list[str] | None) -> TrainConfig:
    """The config that the command line says."""
    return tyro.cli(TrainConfig, prog="maskfleet train", args=arguments)


def _run(config: TrainConfig) -> int:
    if config.on == "process":
        sys.stdout.write(_text(train(config)))
        return EXIT_DONE
    from pipeline.train_on_ray import TrainOnRay  # Ray takes a second to import

    place = TrainOnRay(config.on, config.compute)
    try:
        sys.stdout.write(_text(train(config, trainers=place)))
    finally:
        place.close()
    return EXIT_DONE


def _text(trained: Trained) -> str:
    version = trained.version
    miou, steps = version.metrics.get("miou"), version.metrics.get("steps")
    figure = "" if miou is None else f": mIoU {100 * miou:.1f} % of the pictures held out"
    said = "curves and sheet:" if trained.fresh else "made before; nothing was done. See"
    lines = [
        f"{version.path} ({version.sha256[:12]}), {steps:,} steps{figure}",
        f"{said} {trained.folder}/{{curves,sheet}}.png",
        f"next: maskfleet evaluate {version.reference} DATA --keep",
        f"      maskfleet promote candidate@{version.registry}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
