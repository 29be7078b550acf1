"""A retraining that matters: the streets turn dusky, and a round must notice; then labels go bad.

    python -m benchmarks.drift CAMVID [--steps 2000] [--more 600] [--keep FOLDER]

Three rounds of `maskfleet retrain` on a folder that grows. First the clips filmed by day; then the
labelled pictures of the dusk clip (0001TP) arrive: dusk must improve and day not fall, so the new
model must be promoted. At last pictures arrive whose masks belong to others: it must not be.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import record

DUSK = "0001TP_"
LATE = "Seq05VD_"  # the clip that comes with wrong masks, half of it
SHARE = 0.3  # of the pictures decide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("--model", default="latent_attention:plus s")
    parser.add_argument("--steps", type=int, default=2000, help="of the first champion")
    parser.add_argument("--more", type=int, default=600, help="of a retraining")
    parser.add_argument("--keep", type=Path, help="a folder for data and registry")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = asked.keep or Path(made)
        record("drift of the street scenes, three rounds of retrain", rounds(asked, folder))


def rounds(asked: argparse.Namespace, folder: Path) -> list[str]:
    """Do them; a row each."""
    data, registry = folder / "labels", folder / "registry"
    names = sorted(path.stem for path in (asked.camvid / "images").iterdir())
    dusk = [name for name in names if name.startswith(DUSK)]
    late = [name for name in names if name.startswith(LATE)]
    day = [name for name in names if name not in {*dusk, *late[::2]}]
    begin(asked.camvid, data)
    rows = [
        "| round | new | verdict | mIoU before | after | day | dusk | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    steps = (
        ("day only", {name: name for name in day}, asked.steps, 1e-3),
        ("dusk arrives", {name: name for name in dusk}, asked.more, 3e-4),
        ("shuffled masks arrive", shuffled(late[::2]), asked.more, 3e-4),
    )
    for title, pairs, length, peak in steps:
        arrive(asked.camvid, data, pairs)
        rows.append(row(title, len(pairs), one_round(asked, data, registry, length, peak)))
        print(rows[-1], flush=True)
    return rows


def begin(camvid: Path, data: Path) -> None:
    """An empty folder that knows its classes and strata."""
    about = json.loads((camvid / "dataset.json").read_text())
    about.pop("splits")
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    (data / "dataset.json").write_text(json.dumps(about))
    (data / "strata.json").write_text(json.dumps({f"{DUSK}*": "dusk", "": "day"}))


def arrive(camvid: Path, data: Path, pairs: dict[str, str]) -> None:
    """Copy pictures, each with somebody's mask."""
    suffix = next((camvid / "images").iterdir()).suffix
    for picture, mask in pairs.items():
        shutil.copy(camvid / "images" / f"{picture}{suffix}", data / "images")
        shutil.copy(camvid / "masks" / f"{mask}.png", data / "masks" / f"{picture}.png")


def shuffled(names: list[str]) -> dict[str, str]:
    """To every picture the mask of one far from it in the clip."""
    others = names[len(names) // 2 :] + names[: len(names) // 2]
    random.Random(0).shuffle(others)
    return dict(zip(names, others, strict=True))


def one_round(
    asked: argparse.Namespace, data: Path, registry: Path, length: int, peak: float
) -> dict[str, object]:
    """`maskfleet retrain`; its record."""
    changes = {
        "length": length,
        "unit": "steps",
        "rate.peak": peak,
        "rate.course": "cosine",
        "bf16": "true",
        "augment.size": "[240,320]",
        "augment.zoom": "[0.6,1.6]",
    }
    words = [
        *("--model", asked.model, "--out", registry, "--name", "street", "--recipe", "street"),
        *(part for key, value in changes.items() for part in ("--set", f"{key}={value}")),
        *("--share", SHARE, "--every", length // 4, "--threads", 1, "--log", "json"),
    ]
    command = [sys.executable, "-m", "jobs.retrain", str(data), *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "registry": registry}


def row(title: str, new: int, found: dict[str, object]) -> str:
    """A line of the table."""
    decision = json.loads(Path(found["registry"], found["decision"], "decision.json").read_text())
    change = {reason["name"]: reason for reason in decision["reasons"]}
    strata = (
        "" if one is None or one["value"] is None
        else f"{100 * one['value']:+.1f} ({100 * one['low']:+.1f} … {100 * one['high']:+.1f})"
        for one in (change.get("stratum day"), change.get("stratum dusk"))
    )  # fmt: skip
    before = found["champion_miou"]
    return " | ".join(
        [
            f"| {title}",
            str(new),
            str(found["verdict"]),
            "" if before is None else f"{100 * before:.1f}",
            f"{100 * found['candidate_miou']:.1f}",
            *strata,
            f"{found['seconds'] / 60:.1f} |",
        ]
    )


if __name__ == "__main__":
    main()
