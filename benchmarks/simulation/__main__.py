"""10^8 pictures on 64 GPUs, simulated: how long, and what is in the way.

    python -m benchmarks.simulation [--source-prefixes 32] [--gpus 128] …

Every fragment is simulated on its way through the driver, load, segment and store, with nodes that
are lost. What twice of a resource would bring is simulated on fewer fragments, without losses.
"""

import argparse
import dataclasses
from dataclasses import replace
from typing import TypeVar

from benchmarks.record import record
from benchmarks.simulation.description import RESOURCES, Cluster, Work, doubled
from benchmarks.simulation.fleet import Outcome, simulated

Description = TypeVar("Description", Work, Cluster)


def parser() -> argparse.ArgumentParser:
    """A flag for every figure."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in (*dataclasses.fields(Work), *dataclasses.fields(Cluster)):
        made.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{field.metadata['origin']} (%(default)g)",
        )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--window", type=int, default=20_000, help="fragments behind each line on twice a resource"
    )
    return made


def described(kind: type[Description], given: argparse.Namespace) -> Description:
    """The flags that belong to one description."""
    return kind(**{field.name: getattr(given, field.name) for field in dataclasses.fields(kind)})


def about(work: Work, cluster: Cluster) -> str:
    """What was simulated, in a sentence."""
    return (
        f"Simulated, not measured; predict assumed at {cluster.gpu_rate:,.0f} pictures/s a GPU."
        f" {work.pictures:,} pictures of {work.encoded_bytes / 1e3:.0f} kB in {work.fragments:,}"
        f" fragments; {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs, {cluster.cores} cores,"
        f" {cluster.network / 1e9:.0f} Gbit/s; {cluster.source_prefixes} source prefix(es)"
    )


def of_run(outcome: Outcome) -> list[str]:
    """The table of the whole run."""
    return [
        "| the whole run | |",
        "|---|---|",
        f"| hours | {outcome.seconds / 3600:.2f} |",
        f"| pictures/s | {outcome.pictures_per_second:,.0f} |",
        f"| bottleneck | {outcome.bottleneck} |",
        *(f"| {name}, busy | {share:.1%} |" for name, share in outcome.used.items()),
        f"| nodes lost | {outcome.losses} |",
        f"| pictures begun again | {outcome.begun_again:,} |",
        (
            f"| fragments committed once, of all | {outcome.commits.count(1):,}"
            f" of {len(outcome.commits):,} |"
        ),
    ]


def of_doubling(work: Work, cluster: Cluster, seed: int) -> list[str]:
    """What twice of each resource brings."""
    base = simulated(work, cluster, seed)
    lines = [
        "| twice the | pictures/s | times | then in the way |",
        "|---|---|---|---|",
        f"| (as it is) | {base.steady:,.0f} | 1.00 | {base.bottleneck} |",
    ]
    for resource in RESOURCES:
        outcome = simulated(work, doubled(cluster, resource), seed)
        rate, gain = outcome.steady, outcome.steady / base.steady
        lines.append(f"| {resource} | {rate:,.0f} | {gain:.2f} | {outcome.bottleneck} |")
    return lines


def main() -> None:
    """Simulate and record."""
    given = parser().parse_args()
    work, cluster = described(Work, given), described(Cluster, given)
    part = replace(work, pictures=min(work.pictures, given.window * work.fragment_pictures))
    lines = [
        about(work, cluster),
        "",
        *of_run(simulated(work, cluster, given.seed)),
        "",
        *of_doubling(part, replace(cluster, losses=0), given.seed),
    ]
    record(f"simulated: {work.pictures:,} pictures on {cluster.gpus} GPUs", lines)


if __name__ == "__main__":
    main()
