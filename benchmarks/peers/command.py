"""The command line that all peers share."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import models

DEMO = Path(models.__file__).parent / "demo"


@dataclass(frozen=True, slots=True)
class Command:
    """What a peer is asked to do."""

    source: Path
    """A folder of pictures, or of tar shards."""
    out: Path
    """A new folder, for `masks/` and `statistics/`."""
    model: Path
    """The bundle."""
    form: str
    """plain: as a bundle is loaded; folded: with our folding, memory format and allocator;
    written: the latent-attention net as its document writes it (benchmarks/tutorial.py)."""
    batch: int
    """Pictures given to the model at once."""
    threads: int
    """torch's threads in each process (or instance) that predicts."""
    workers: int
    """What runs in parallel: see each peer."""
    reader: str
    """Which of the framework's ways in: see each peer."""

    @property
    def shards(self) -> list[Path]:
        """The tar shards below the source, if that is what it holds."""
        return sorted(self.source.rglob("*.tar"))


def parsed(about: str | None, readers: tuple[str, ...] = ("files",)) -> Command:
    """This process's command line; the output folder is made."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--form", choices=("written", "plain", "folded"), default="plain")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--reader", choices=readers, default=readers[0])
    given = vars(parser.parse_args())
    given["source"], given["out"] = given["source"].resolve(), given["out"].resolve()
    (given["out"] / "masks").mkdir(parents=True)
    (given["out"] / "statistics").mkdir()
    return Command(**given)
