"""Segment every image of an archive, each exactly once; the same command resumes and extends it."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import tyro
import yaml

from jobs import ended
from pipeline.archive import Outcome, segment_archive
from pipeline.config import Compute, SegmentConfig, from_mapping
from pipeline.errors import EXIT_DONE, RunRefused
from pipeline.place import Capacity, Found, Place
from pipeline.progress import duration
from pipeline.records import Receipt, Task
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
    cli = partial(tyro.cli, SegmentConfig, prog="maskfleet segment", args=arguments)
    config = cli(default=_from_file(file)) if file else cli()
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


def _from_file(path: str) -> SegmentConfig:
    folder, _, name = absolute(path).rpartition("/")
    try:
        values = yaml.safe_load(open_store(folder or "/").read(name))
    except yaml.YAMLError as error:
        raise RunRefused(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RunRefused(
            f"--config {path} must hold `name: value` lines, it holds {type(values).__name__}"
        )
    modules = {"architecture": values.get("architecture"), "format": values.get("format")}
    for name, module in modules.items():
        if module and (name == "architecture" or "." in str(module)):
            raise RunRefused(
                f"--config {path}: {name} runs the code of a module, so a file cannot give it; "
                f"say --{name} {module} on the command line"
            )
    flags = {name: tyro.MISSING for name in ("source", "out") if name not in values}
    # What the file leaves to the command line is filled in for the check and asked for after it.
    return from_mapping({**dict.fromkeys(flags, "?"), **values}).model_copy(update=flags)


def _run(config: SegmentConfig) -> int:
    stop = threading.Event()
    _listen(stop)
    place = Chosen(config)
    try:
        outcome = segment_archive(config, place, stop)
    finally:
        place.close()
    return _told(config, outcome)


def _listen(stop: threading.Event) -> None:
    """Ctrl-C or SIGTERM once: finish what is in flight and stop; twice: at once."""

    def heard(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's contract
        if stop.is_set():
            os._exit(4)  # nothing to tidy: every write is whole or absent
        stop.set()
        sys.stderr.write("\nstopping after the fragments in flight; once more to stop at once\n")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, heard)
        signal.signal(signal.SIGTERM, heard)


class Chosen:
    """The place that --on names; without it the surrounding Ray job's cluster, else by size."""

    def __init__(self, config: SegmentConfig) -> None:
        inside = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        self._where = config.on or ("auto" if inside else None)
        self._compute = config.compute
        self._place: Place | None = None

    @property
    def capacity(self) -> Capacity:
        """See `pipeline.place.Place.capacity`."""
        return Capacity(0) if self._place is None else self._place.capacity

    def _for(self, images: int) -> Place:
        if self._place is None:
            where = self._where or ("process" if images <= SMALL else "local")
            here = where == "process"
            self._place = _here(self._compute) if here else _on_ray(where, self._compute)
        return self._place

    def found(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Found:
        """See `pipeline.place.Place.found`."""
        return self._for(images).found(bundle, images, config)

    def run(self, tasks: Iterable[Task], run_uri: str, stop: threading.Event) -> Iterator[Receipt]:
        """See `pipeline.place.Place.run`."""
        todo = list(tasks)
        yield from self._for(sum(task.images for task in todo)).run(todo, run_uri, stop)

    def close(self) -> None:
        """See `pipeline.place.Place.close`."""
        if self._place is not None:
            self._place.close()


def _here(compute: Compute) -> Place:
    # What is imported stays: to look for garbage in it takes 0.15 s of the import, and 0.2 s when
    # Python ends (torch 2.13).
    gc.disable()
    from pipeline.here import Here  # torch takes seconds to import: not for a refusal or --help

    gc.freeze()
    gc.enable()
    return Here(compute)


def _on_ray(where: str, compute: Compute) -> Place:
    from pipeline.cluster import OnRay  # Ray takes a second to import

    return OnRay(where, compute)


def _told(config: SegmentConfig, outcome: Outcome) -> int:
    """The short summary a person ends with."""
    receipt = outcome.receipt
    if config.log == "json":
        import json

        sys.stdout.write(json.dumps(receipt) + "\n")
        return outcome.exit_code
    skipped = sum(receipt["skipped"].values())
    if receipt.get("dry_run"):
        sys.stdout.write(
            f"dry run: {receipt['images']} images ({receipt['encoded_bytes'] / 1e6:.1f} MB) "
            f"to do {receipt['changes']}, {skipped} objects skipped, "
            f"{receipt['left_out']} left out; nothing was written\n"
        )
        return EXIT_DONE
    counts, call = receipt["counts"], receipt["this_call"]
    answers = "masks" if receipt["task"] == "segment" else "labels"
    lines = [
        (
            f"{counts['done']} {answers}, {counts['rejected_total']} rejected"
            f" of {counts['planned']} images ({skipped} other objects skipped)"
        ),
        (
            f"this call: {call['images']} images, {call['megapixels']:.1f} MP"
            f" in {duration(call['seconds'])} ({call['images_per_second']:.1f} images/s)"
        ),
        *_limits(call),
        *(f"  rejected: {n} {reason}" for reason, n in counts["rejected"].items()),
        f"run: {config.out}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return outcome.exit_code


def _limits(call: dict[str, Any]) -> Iterator[str]:
    """How near to the machine's limit it came, and what was in the way."""
    if call["efficiency"] is not None and call["seconds_first_to_last_fragment"]:
        yield (
            f"  {call['images_per_second_first_to_last_fragment']:.1f} images/s from first "
            f"fragment to last, {call['efficiency']:.0%} of what {call['cores']} cores can do; "
            f"limited by {call['bottleneck']}"
        )


if __name__ == "__main__":
    sys.exit(main())
