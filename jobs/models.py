"""List the architectures: parameters, operations, sizes they take, and what they are good for."""

import sys
from typing import Annotated

import tyro

import models
from jobs import ended
from pipeline.errors import EXIT_DONE, RunRefused


def show(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    classes: int = 19,
) -> int:
    """List the architectures, or the variants of one of them.

    Args:
        name: an architecture; all of them by default, each as its document specifies it.
        classes: the number of classes to count with.
    """
    if name is not None and name not in models.names():
        raise RunRefused(f"there is no architecture {name!r} ({', '.join(models.names())})")
    rows = [("name", "task", "parameters", "GFLOP at 512²", "stride", "smallest", "good for")]
    for each in [name] if name else models.names():
        about = models.about(each)
        variants = about.variants if name else dict([next(iter(about.variants.items()))])
        for variant, config in variants.items():
            facts = models.facts(each, **{"classes": classes, **config})
            rows.append(
                (
                    f"{each} {variant}".strip(),
                    facts.task,
                    f"{facts.parameters:,}",
                    f"{facts.gflop:.1f}",
                    str(facts.stride),
                    str(facts.min_side),
                    about.good_for,
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    return EXIT_DONE


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    return ended(lambda: tyro.cli(show, prog="maskfleet models", args=arguments))


if __name__ == "__main__":
    sys.exit(main())
