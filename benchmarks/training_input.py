"""How much of the model's pace a training keeps when it has to read, cut and colour its pictures.

    python -m benchmarks.training_input DATA [--model "latent_attention:plus s"] [--recipe street]
        [--set KEY=VALUE ...] [--steps 60] [--threads 1]

Stretches of steps take turns: on one batch that lies in memory, and on batches that are made as
`maskfleet train` makes them. The ratio of the two rates is the figure; beside it the pace of the
input path alone.
"""

import argparse
import itertools
import time

import torch

from benchmarks.record import record
from models.training.batches import batch_of
from models.training.fit import Fit
from models.training.recipes import Recipe
from pipeline.storage import open_store
from pipeline.train_config import TrainConfig
from pipeline.training import here
from pipeline.training_plan import balanced, job_of, opened, recipe_of, roles, start_of

TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--model", default="latent_attention:plus s")
    parser.add_argument("--recipe", default="street")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=60, help="in all turns of a kind")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    record("training input against the model alone", measured(asked))


def measured(asked: argparse.Namespace) -> list[str]:
    """Pictures a second of three kinds of stretches."""
    config = TrainConfig(
        data=asked.data,
        model=asked.model,
        out="never-written",
        recipe=asked.recipe,
        set=tuple(asked.set),
    )
    labelled = opened(config)
    learnt, look = roles(config, labelled)
    start = start_of(config, labelled)
    recipe: Recipe = balanced(recipe_of(config, start.card, labelled.ontology), learnt)
    job = job_of(config, open_store(config.out), start, learnt, look, recipe)
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    from pipeline.training import fresh_model

    fit = Fit(fresh_model(job), recipe, pictures=len(learnt.items))
    feed = here(job)(0)
    made = (batch_of(part.pixels_BhwC, part.labels, recipe) for part in feed)
    first = next(made)
    still = (tuple(each.clone() for each in first) for _ in itertools.count())
    each = asked.steps // TURNS
    seconds = {"model": 0.0, "both": 0.0, "input": 0.0}
    stretch(fit, still, 3)
    for _ in range(TURNS):
        seconds["model"] += stretch(fit, still, each)
        stretch(fit, made, 4)  # what waited ready while the model ran alone
        seconds["both"] += stretch(fit, made, each)
        began = time.perf_counter()
        for _ in range(each):
            next(made)
        seconds["input"] += time.perf_counter() - began
    done = TURNS * each * recipe.batch
    rates = {name: done / spent for name, spent in seconds.items()}
    return [
        "| model alone, pictures/s | as trained | share kept | input alone |",
        "|---|---|---|---|",
        (
            f"| {rates['model']:.1f} | {rates['both']:.1f} | "
            f"{100 * rates['both'] / rates['model']:.0f} % | {rates['input']:.1f} |"
        ),
    ]


def stretch(fit: Fit, batches: object, steps: int) -> float:
    """Seconds of so many steps."""
    began = time.perf_counter()
    for _ in itertools.islice(fit.steps(batches), steps):
        pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
