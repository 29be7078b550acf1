"""Write docs/models.md: what is counted, what was measured here, and a picture per model.

    python -m benchmarks.model_page            # minutes: every row is timed once at 512 x 512
    python -m models.training.gallery --data PATH/TO/nuclei    # the pictures

A test counts everything again that can be counted and compares it with the page, so that it cannot
go stale (tests/test_models_page.py).
"""

import time
from datetime import UTC, datetime
from pathlib import Path

import torch

import models
from benchmarks.models import FORMS, answer, forms, lively, trained, turns
from benchmarks.record import machine
from pipeline.heap import keep_freed_memory

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
CLASSES = 19  # Cityscapes', the commonest count in the papers
MOST_PARAMETERS = 100e6  # larger ones are counted, not timed
HEAD = """# Models

`maskfleet models` prints this table, `maskfleet models NAME` the variants of one;
`build("segformer", variant="b0")` makes one, and `models/segformer.py` is all of it. Every model
takes any picture from its smallest side on: it is padded at the bottom and on the right, with the
mean, to a multiple of *pads to*, and what it answers then is its answer, alone or in any batch.
`model.folded()` is the form that `segment` runs: the same weights, fewer operations.

Counted with {classes} classes, or those of the document; GFLOP of one 512 x 512 picture (a multiply
and an add are two).
Milliseconds of processor time: such a picture, one thread, {machine}, {date}.
"""
FOOT = """
## Half precision and compiling

`segment --inference.precision bf16` and `--inference.compile` are off by default, because they
change some labels. {differ}. A trained model has few near ties; with random weights
up to some per cent differ (benchmarks/RESULTS.md). Compiling takes tens of seconds for every new
shape of picture; it pays in long runs over pictures of one size, and never for `latent_attention`,
whose folded form is the faster one.

## What they answer

A small config of each, trained for a few minutes on nuclei (`python -m models.training.gallery`):
the picture, how sure the model is of nuclei, and its mask. They show what its answers look like,
not how good it can become.

{pictures}## Licences

{licences}
"""


def counted(name: str, variant: str) -> list[str]:
    """The cells of a row that need no clock."""
    config = {"classes": CLASSES, **models.about(name).variants[variant]}
    facts = models.facts(name, **config)
    field = "everything" if facts.receptive_field is None else f"{facts.receptive_field} px"
    return [
        f"{name} {variant}",
        f"{facts.parameters:,}",
        f"{facts.gflop:.1f}",
        str(facts.stride),
        str(facts.min_side),
        str(facts.multiple),
        field,
    ]


@torch.inference_mode()
def timed(name: str, variant: str) -> list[str]:
    """Milliseconds of the plain and of the folded form; dashes for what is too large here."""
    config = {"classes": CLASSES, **models.about(name).variants[variant]}
    facts = models.facts(name, **config)
    if facts.parameters > MOST_PARAMETERS or facts.gflop > 300:
        return ["-", "-"]
    model = lively(name, variant)
    x_1CHW = torch.randn(1, model.channels, 512, 512)
    calls = [lambda f=form: answer(f, x_1CHW) for form in forms(model, ["plain", "folded"])]
    return [f"{1000 * seconds:.0f}" for seconds in turns(calls, time.thread_time)]


def main() -> None:
    """Count, time, write."""
    torch.set_num_threads(1)
    keep_freed_memory()
    date = datetime.now(UTC).date().isoformat()
    lines = [HEAD.format(classes=CLASSES, machine=machine(), date=date)]
    lines.append(
        "| model | parameters | GFLOP | stride | smallest side | pads to | sees"
        " | plain, ms | folded, ms |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in models.names():
        for variant in models.about(name).variants:
            lines.append(f"| {' | '.join(counted(name, variant) + timed(name, variant))} |")
            print(lines[-1], flush=True)
    lines += ["", "| model | paper | good for |", "|---|---|---|"]
    lines += [
        f"| {n} | {models.about(n).paper} | {models.about(n).good_for} |" for n in models.names()
    ]
    pictures = "".join(f"**{n}**\n\n![{n}](models/{n}.png)\n\n" for n in models.names())
    licences = "\n".join(f"- {n}: {models.about(n).licence}." for n in models.names())
    differ = trained(list(FORMS))[-1]
    lines.append(FOOT.format(differ=differ, pictures=pictures, licences=licences))
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
