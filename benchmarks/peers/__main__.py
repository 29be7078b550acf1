"""`maskfleet segment` against what others would run for the same work, interleaved.

    python -m benchmarks.peers --street FOLDER --mixed FOLDER [--corpora street mixed shards]
        [--entrants process local bf16 ray_data daft_frame torch_loader plain_loop]
        [--forms plain folded] [--images 900] [--repeats 3] [--tune]

Corpora: street, loose pictures of one size; mixed, loose ones of many sizes; shards, the street
pictures as members of tar files, 100 in each. Forms are those of the model that the peers get:
plain, as a bundle is loaded; folded, with our folding, memory format and allocator settings;
written, of a seed bundle (`python -m benchmarks.tutorial`): the net as its document writes it.
Entrants of ours: process and local are `--on`, bf16 is `--inference.precision bf16`.

In an environment with `.[bench]`. Every run is a whole command in a process of its own, with
settings that `--tune` found before on the same kind of corpus (settings.json). No ratio is reported
of an entrant whose pixel counts differ from ours in more than a 10,000th; bf16, which is another
arithmetic, excepted. Reported: medians of pictures/s, and ours divided by theirs. What is shared,
and what was done in the peers' favour, is said in `benchmarks/peers/__init__.py`.
"""

import argparse
import statistics
import tempfile
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from benchmarks.corpora import in_turn, repeated, sharded
from benchmarks.peers.entrants import OURS, PEERS, Corpus, Entrant, Finish
from benchmarks.peers.same_work import TOLERANCE, differing
from benchmarks.peers.tuning import best_known, tuned
from benchmarks.record import record

ORIENTATION = 274  # the EXIF tag
TILE = 1024  # sides above are cut by default


def upright(path: Path) -> bool:
    """Whether a picture is stored upright: neither `read_images` nor Daft turn what is not."""
    with Image.open(path) as image:
        return image.getexif().get(ORIENTATION) not in range(2, 9)


def corpus_of(name: str, given: Namespace, folder: Path) -> Corpus:
    """The corpus, made in the folder."""
    source = [given.mixed if name == "mixed" else given.street]
    if source == [None]:
        raise SystemExit(f"{name} needs --{'mixed' if name == 'mixed' else 'street'} FOLDER")
    make = sharded if name == "shards" else repeated
    below = make(source, given.images, folder / name, wanted=upright)
    side = max(max(Image.open(p).size) for p in set(in_turn(source, given.images, upright)))
    whole = ("--tile.size", str(side)) if side > TILE else ()
    return Corpus(name, below, given.images, whole)


def race(corpus: Corpus, given: Namespace) -> list[str]:
    """Every entrant in turn, several times; the lines of the record."""
    entrants = [Entrant(name, "folded") for name in OURS if name in given.entrants]
    for peer in (name for name in PEERS if name in given.entrants):
        for form in given.forms:
            knobs = best_known(peer, form, corpus.name)
            entrants.append(Entrant(peer, form, tuple(knobs.items())))
    reference = entrants[0]
    if reference.name not in {"process", "local"}:
        raise SystemExit("--entrants must hold process or local: all are compared with it")
    finishes: dict[Entrant, list[Finish]] = {entrant: [] for entrant in entrants}
    flipped: dict[Entrant, float] = {}
    for turn in range(given.repeats):
        for entrant in entrants:
            finish = entrant.run(corpus, given.model)
            finishes[entrant].append(finish)
            flipped[entrant] = checked(entrant, finish, finishes[reference][0])
            print(f"{turn} {entrant.name} {entrant.form}: {finish.whole:.2f}/s", flush=True)
    return told(corpus, finishes, flipped)


def tune(corpus: Corpus, given: Namespace) -> list[str]:
    """The peers' best settings; the lines of the record."""
    ours = Entrant("process", "folded").run(corpus, given.model).counts
    lines = [
        about(corpus),
        "",
        "| peer | model | settings | whole command, pictures/s | pixels that differ |",
        "|---|---|---|---|---|",
    ]
    for form in given.forms:
        for peer in (name for name in PEERS if name in given.entrants):
            lines += tuned(peer, form, corpus, given, ours)
    return lines


def about(corpus: Corpus) -> str:
    """What was segmented, and by which versions."""
    whole = f", ours with {' '.join(corpus.whole)}" if corpus.whole else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "daft", "torch", "pyarrow"))
    return f"{corpus.name}: {corpus.pictures} pictures{whole}; {versions}"


def checked(entrant: Entrant, finish: Finish, ours: Finish) -> float:
    """The share of pixels that have another class than ours.

    Raises:
        SystemExit: it is not the same work.
    """
    share = differing(ours.counts, finish.counts)
    if share > TOLERANCE and entrant.name != "bf16":
        raise SystemExit(
            f"{entrant.name} {entrant.form} {entrant.settings}: {share:.2e} of the pixels have"
            f" another class than ours, more than {TOLERANCE:g}: no ratio of unequal work"
        )
    return share


def told(
    corpus: Corpus, finishes: dict[Entrant, list[Finish]], flipped: dict[Entrant, float]
) -> list[str]:
    """Rates, then ratios."""
    medians = {
        entrant: (_median(f, "whole"), _median(f, "steady")) for entrant, f in finishes.items()
    }
    lines = [
        about(corpus),
        "",
        (
            "| entrant | model | settings | whole command, pictures/s | first to last"
            " | pixels that differ |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for entrant, (whole_rate, steady) in medians.items():
        lines.append(
            f"| {_name(entrant)} | {entrant.form} | {entrant.settings} | {whole_rate:.2f}"
            f" | {steady:.2f} | {flipped[entrant]:.1e} |"
        )
    ours = [entrant for entrant in medians if entrant.ours]
    theirs = [entrant for entrant in medians if not entrant.ours]
    if theirs:
        heads = " | ".join(f"{_name(each)} ÷ it, whole command, first to last" for each in ours)
        lines += ["", f"| peer | model | {heads} |", "|---|---|" + "---|" * len(ours)]
    for peer in theirs:
        ratios = " | ".join(
            ", ".join(f"{a / b:.2f}" for a, b in zip(medians[each], medians[peer], strict=True))
            for each in ours
        )
        lines.append(f"| {peer.name} | {peer.form} | {ratios} |")
    return lines


def _median(finishes: list[Finish], which: str) -> float:
    return statistics.median(getattr(f, which) or float("nan") for f in finishes)


def _name(entrant: Entrant) -> str:
    return f"maskfleet {entrant.name}" if entrant.ours else entrant.name


def parsed() -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    corpora, forms = ("street", "mixed", "shards"), ("written", "plain", "folded")
    everyone = (*OURS, *PEERS)
    parser.add_argument("--street", type=Path, help="pictures of one size")
    parser.add_argument("--mixed", type=Path, help="pictures of many sizes")
    parser.add_argument("--corpora", nargs="+", choices=corpora, default=corpora)
    parser.add_argument("--entrants", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--forms", nargs="+", choices=forms, default=forms[1:])
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tune", action="store_true", help="find the peers' best settings instead")
    return parser.parse_args()


def main() -> None:
    """Tune or race, and record."""
    given = parsed()
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.corpora:
            corpus = corpus_of(kind, given, Path(folder))
            if given.tune:
                record(f"peers, their settings: {kind}", tune(corpus, given))
            else:
                record(f"peers: {kind}", race(corpus, given))


if __name__ == "__main__":
    main()
