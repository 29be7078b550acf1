"""Let a candidate replace the champion if it is proven to be better; write down why, or why not."""

import json as jsons
import sys
from dataclasses import asdict
from typing import Annotated

import pyarrow as pa
import tyro

from jobs import ended
from pipeline.decision import as_text
from pipeline.errors import EXIT_DONE, EXIT_NOT_PROMOTED, EXIT_UNDECIDED, RunRefused
from pipeline.gate import Evidence, Look, Outcome, beside, contest
from pipeline.promotion import Rules
from pipeline.registry import CHAMPION, Registry
from pipeline.storage import absolute, open_store
from pipeline.tables import read_table
from pipeline.versions import Version, parse

RULES = Rules()


def promote(
    candidate: Annotated[str, tyro.conf.Positional],
    alias: str = CHAMPION,
    evalset: str | None = None,
    champion_table: str | None = None,
    candidate_table: str | None = None,
    canaries: str | None = None,
    force: bool = False,
    reason: str | None = None,
    json: bool = False,
    rules: Rules = RULES,
) -> int:
    """Let a candidate replace the champion if it is proven to be better.

    Args:
        candidate: candidate@REGISTRY or NAME/v0007@REGISTRY.
        alias: what it is to become.
        evalset: hash of the evaluation set that both were evaluated on; default: the only one.
        champion_table: the champion's evaluation, a Parquet file; default: the one beside it.
        candidate_table: the candidate's evaluation, a Parquet file; default: the one beside it.
        canaries: a Parquet file of what changes on unlabelled pictures.
        force: promote whatever the evidence says; needs --reason.
        reason: for whoever reads the history of the alias.
        json: machine-readable, one object.
        rules: what the candidate must show.

    Returns:
        0 promoted, 5 refused, 6 undecided, 4 somebody else was first: look again.
    """
    meant = parse(candidate)
    if meant is None:
        raise RunRefused("give the candidate as candidate@REGISTRY or NAME/v0007@REGISTRY")
    registry = Registry.open(open_store(meant.registry))
    found = beside(registry, evalset)
    if candidate_table is not None:
        found = _from_files(champion_table, candidate_table)
    elif champion_table is not None:
        raise RunRefused("--champion-table needs --candidate-table")
    outcome = contest(
        registry,
        meant.what,
        _with(canaries, found),
        rules,
        alias=alias,
        reason=reason,
        forced=force,
    )
    sys.stdout.write(_as_json(outcome) if json else _as_text(outcome, alias, registry.store.uri))
    if outcome.entry is not None:
        return EXIT_DONE
    refused = outcome.decision is not None and outcome.decision.verdict == "refuse"
    return EXIT_NOT_PROMOTED if refused else EXIT_UNDECIDED


def _from_files(champion: str | None, candidate: str) -> Look:
    def look(holder: Version | None, challenger: Version) -> Evidence:  # noqa: ARG001 - as `Look` is
        old = None if champion is None or holder is None else _table(champion)
        return Evidence(old, _table(candidate))

    return look


def _with(canaries: str | None, look: Look) -> Look:
    def looked(holder: Version | None, challenger: Version) -> Evidence | None:
        found = look(holder, challenger)
        if found is None or canaries is None:
            return found
        return Evidence(found.champion, found.candidate, _table(canaries))

    return looked


def _table(uri: str) -> pa.Table:
    folder, _, name = absolute(uri).rpartition("/")
    return read_table(open_store(folder or "/").read(name))


def _as_json(outcome: Outcome) -> str:
    return jsons.dumps(asdict(outcome)) + "\n"


def _as_text(outcome: Outcome, alias: str, registry: str) -> str:
    entry, decision, path = outcome.entry, outcome.decision, outcome.candidate.path
    if entry is not None and outcome.champion == outcome.candidate:
        return f"{path} is {alias} already\n"
    against = f"against {outcome.champion.path}" if outcome.champion else "the first"
    lines = [f"{path} {against}: {decision.verdict if decision else 'no evidence'}"]
    if decision is not None:
        lines += as_text(decision)
        lines.append(f"written down in {registry}/{outcome.folder}/decision.md")
    if entry is not None:
        how = "proven" if entry.previous else "the first"
        how = f"forced ({entry.reason})" if entry.forced else how
        lines.append(f"{alias} is {path} now, {how}")
        if entry.previous:
            lines.append(f"undo: maskfleet registry rollback {registry} {alias}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    return ended(lambda: tyro.cli(promote, prog="maskfleet promote", args=arguments))


if __name__ == "__main__":
    sys.exit(main())
