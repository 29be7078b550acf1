"""One round of retraining: train on today's labels, promote the new model if proven better."""

import json
import sys
from typing import Any

import tyro

from jobs import ended
from pipeline.errors import EXIT_DONE
from pipeline.retrain import RetrainConfig, Round, retrain


def main(arguments: list[str] | None = None) -> int:
    """Parse, do the round, say how it ended.

    Args:
        arguments: the command line without the program's name; default: this process's.

    Returns:
        0 a decision was made and written down, whichever, or nothing is new; 2 refused to begin;
        4 stopped before the end, or somebody else promoted first: run it again.
    """
    return ended(lambda: _run(parsed(arguments)))


def parsed(arguments: list[str] | None) -> RetrainConfig:
    """The config that the command line says."""
    return tyro.cli(RetrainConfig, prog="maskfleet retrain", args=arguments)


def _run(config: RetrainConfig) -> int:
    place: Any
    if config.on == "process":
        from pipeline.here import Here  # torch takes seconds: not for a refusal or --help

        place = Here(config.compute)
        done = retrain(config, place)
    else:
        from pipeline.train_on_ray import TrainOnRay

        place = TrainOnRay(config.on, config.compute)
        try:
            done = retrain(config, place, place)
        finally:
            place.close()
    sys.stdout.write(_text(config, done))
    return EXIT_DONE


def _text(config: RetrainConfig, done: Round) -> str:
    record = done.record
    if config.log == "json":
        return json.dumps({**record, "verdict": done.verdict, "fresh": done.fresh}) + "\n"
    if done.verdict == "nothing new":
        return (
            f"nothing new: {record['champion']} has learnt from these labels; see {done.folder}\n"
        )
    against = f" against {record['champion']}" if record["champion"] else ", the first"
    before = record["champion_miou"]
    figures = f"{100 * record['candidate_miou']:.1f} % mIoU" + (
        f", {100 * before:.1f} % before" if before is not None else ""
    )
    again = "" if done.fresh else " (decided before; nothing was done)"
    return (
        f"{record['candidate']}{against}: {record['verdict']}, {figures} on "
        f"{record['deciding']} pictures{again}\nwritten down in {done.folder}/record.md\n"
    )


if __name__ == "__main__":
    sys.exit(main())
