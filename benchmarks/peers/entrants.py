"""Who races: `maskfleet segment` in its forms and the peers, each one whole command."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.same_work import Counts, of_peer, of_run

ROOT = Path(__file__).parents[2]
OURS = {
    "process": ("--on", "process"),
    "local": ("--on", "local"),
    "bf16": ("--on", "process", "--inference.precision", "bf16"),
}
PEERS = ("ray_data", "daft_frame", "torch_loader", "plain_loop")
PATIENCE_S = 900


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is to be segmented."""

    name: str
    folder: Path
    pictures: int
    whole: tuple[str, ...] = ()
    """What ours is told so that it reads every picture whole, as the peers do."""


@dataclass(frozen=True, slots=True)
class Finish:
    """How a run went."""

    whole: float
    """Pictures/s of the whole command, from its start to its end."""
    steady: float | None
    """Pictures/s from the first fragment or batch to the last."""
    counts: Counts
    """Pixels by picture and class."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """One way of doing the work."""

    name: str
    form: str
    """plain or folded for peers; ours is always folded."""
    knobs: tuple[tuple[str, str | int], ...] = ()

    @property
    def ours(self) -> bool:
        """Whether it is `maskfleet segment`."""
        return self.name in OURS

    @property
    def settings(self) -> str:
        """The knobs, for people."""
        return " ".join(OURS[self.name] if self.ours else (f"{k}={v}" for k, v in self.knobs))

    def run(self, corpus: Corpus, model: str) -> Finish:
        """The whole command, once; what it stored is removed."""
        with tempfile.TemporaryDirectory() as folder:
            return self._run(self._words(corpus, model, Path(folder) / "out"), Path(folder) / "out")

    def _run(self, words: list[str], out: Path) -> Finish:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *words],
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE_S,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}\n{done.stderr}")
        if self.ours:
            call = json.loads(done.stdout)["this_call"]
            steady = call["images_per_second_first_to_last_fragment"]
            return Finish(call["images"] / seconds, steady, of_run(out))
        line = json.loads(done.stdout.splitlines()[-1])
        steady = line["per_second_first_to_last_batch"]
        return Finish(line["pictures"] / seconds, steady, of_peer(out))

    def _words(self, corpus: Corpus, model: str, out: Path) -> list[str]:
        if self.ours:
            mine = ["--out", str(out), "--model", model, *OURS[self.name], *corpus.whole]
            return ["jobs", "segment", str(corpus.folder), *mine, "--log", "json"]
        words = [f"benchmarks.peers.{self.name}", str(corpus.folder), str(out), "--form", self.form]
        if model != "demo":
            words += ["--model", model]
        return words + [word for k, v in self.knobs for word in (f"--{k}", str(v))]
