"""Segment every image of an archive, each exactly once; the same command resumes and extends it."""

import os
import signal
import sys
import threading
from types import FrameType

import tyro
import yaml

from jobs import ended
from pipeline.archive import Here, Outcome, Place, segment_archive
from pipeline.config import SegmentConfig, from_mapping
from pipeline.errors import EXIT_DONE, RunRefused
from pipeline.progress import duration
from pipeline.storage import absolute, open_store

SMALL = (
    10_000  # images; beyond that Ray's start (about 10 s) no longer shows, and its supervision pays
)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, summarise.

    Args:
        arguments: the command line without the program's name; default: this process's.

    Returns:
        The exit code.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: _run(parsed(given)))


def parsed(arguments: list[str]) -> SegmentConfig:
    """The config: defaults, then ``--config FILE.yaml``, then flags."""
    arguments, file = _without_config(arguments)
    default = _from_file(file, arguments) if file else None
    config = tyro.cli(
        SegmentConfig,
        prog="maskfleet segment",
        args=arguments,
        **({} if default is None else {"default": default}),
    )
    return config.model_copy(
        update={"source": absolute(config.source), "out": absolute(config.out)}
    )


def _without_config(arguments: list[str]) -> tuple[list[str], str | None]:
    for i, word in enumerate(arguments):
        if word.startswith("--config="):
            return arguments[:i] + arguments[i + 1 :], word.partition("=")[2]
        if word == "--config":
            if i + 1 == len(arguments):
                raise RunRefused("--config needs the path of a YAML file")
            return arguments[:i] + arguments[i + 2 :], arguments[i + 1]
    return arguments, None


def _from_file(path: str, arguments: list[str]) -> SegmentConfig:
    folder, _, name = absolute(path).rpartition("/")
    try:
        values = yaml.safe_load(open_store(folder or "/").read(name))
    except yaml.YAMLError as error:
        raise RunRefused(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RunRefused(
            f"--config {path} must hold `name: value` lines, it holds {type(values).__name__}"
        )
    return from_mapping(values)


def _run(config: SegmentConfig) -> int:
    stop = threading.Event()
    _listen(stop)
    place = place_for(config)
    try:
        outcome = segment_archive(config, place, stop)
    finally:
        place.close()
    return _told(config, outcome)


def _listen(stop: threading.Event) -> None:
    """Ctrl-C or SIGTERM once: finish what is in flight and stop; twice: at once."""

    def heard(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if stop.is_set():
            os._exit(4)  # nothing to tidy: every write is whole or absent
        stop.set()
        sys.stderr.write("\nstopping after the fragments in flight; once more to stop at once\n")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, heard)
        signal.signal(signal.SIGTERM, heard)


def place_for(config: SegmentConfig) -> Place:
    """Where to run: what --on says, else the surrounding Ray cluster, else here."""
    where = config.on or ("auto" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "process")
    if where == "process":
        return Here(config.compute)
    from pipeline.cluster import OnRay  # Ray takes a second to import

    return OnRay(where, config.compute)


def _told(config: SegmentConfig, outcome: Outcome) -> int:
    """The short summary a person ends with."""
    receipt = outcome.receipt
    if config.log == "json":
        import json

        sys.stdout.write(json.dumps(receipt) + "\n")
        return outcome.exit_code
    if receipt.get("dry_run"):
        skipped = sum(receipt["skipped"].values())
        sys.stdout.write(
            f"dry run: {receipt['images']} images ({receipt['encoded_bytes'] / 1e6:.1f} MB) to do {receipt['changes']}, "
            f"{skipped} objects skipped, {receipt['left_out']} left out; nothing was written\n"
        )
        return EXIT_DONE
    counts, call = receipt["counts"], receipt["this_call"]
    lines = [
        f"{counts['done']} masks, {counts['rejected_total']} rejected of {counts['planned']} images"
        f" ({sum(receipt['skipped'].values())} other objects skipped)",
        f"this call: {call['images']} images, {call['megapixels']:.1f} MP in {duration(call['seconds'])}"
        f" ({call['images_per_second']:.1f} images/s)",
        *(f"  rejected: {n} {reason}" for reason, n in counts["rejected"].items()),
        f"run: {config.out}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
