"""The gate before production: evidence is judged, the decision written down, the alias moved.

Whoever is champion is looked up before anything is judged, and the alias moves only if that has not
changed in the meantime: of two promotions at the same time one wins, and the other has to look at
the winner.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import RunRefused
from pipeline.ledger import now
from pipeline.promotion import Decision, Rules, decision_record, description, judge
from pipeline.registry import CHAMPION, Registry, tables_for
from pipeline.versions import Entry, Version


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evaluations of both on the same images, and what changes on pictures nobody has labelled."""

    champion: pa.Table | None
    """None where there is no champion yet."""
    candidate: pa.Table
    canaries: pa.Table | None = None


Look = Callable[[Version | None, Version], Evidence | None]
"""Finds the evidence about champion and candidate, or None where there is none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended."""

    candidate: Version
    champion: Version | None
    """Before."""
    decision: Decision | None
    """None: the candidate was what it wanted to be already, or it was forced without evidence."""
    folder: str | None
    """Where the decision is written down."""
    entry: Entry | None
    """What the alias means now, if it is the candidate."""


def contest(
    registry: Registry,
    candidate: str,
    look: Look,
    rules: Rules | None = None,
    *,
    alias: str = CHAMPION,
    reason: str | None = None,
    forced: bool = False,
) -> Outcome:
    """Let a candidate become what an alias means, if the evidence says so.

    Args:
        registry: where both are.
        candidate: an alias or NAME/v0007.
        look: finds the evidence.
        rules: what the candidate must show.
        alias: what it is to become.
        reason: for whoever reads the history.
        forced: move the alias whatever the evidence says; needs a reason.

    Raises:
        RunRefused: there is no evidence, or it is about something else.
        AliasMoved: the alias means another version by now.
    """
    if forced and not reason:
        raise RunRefused("--force overrules the evidence and needs a --reason TEXT")
    challenger, seen = registry.meant(candidate), registry.current(alias)
    if seen is not None and seen.version == challenger.path:
        return Outcome(challenger, challenger, None, None, seen)
    champion = None if seen is None else registry.meant(seen.version)
    evidence = look(champion, challenger)
    if evidence is None and not forced:
        sides = " and ".join(side.reference for side in (champion, challenger) if side)
        raise RunRefused(f"there is no evidence; run `maskfleet evaluate` for {sides}")
    decision = folder = None
    if evidence is not None:
        _refuse_others(evidence, champion, challenger)
        decision = judge(evidence.champion, evidence.candidate, rules, evidence.canaries)
        folder = registry.keep_decision(
            _record(decision, champion, challenger, evidence, alias, reason, forced=forced)
        )
    if not forced and decision is not None and decision.verdict != "promote":
        return Outcome(challenger, champion, decision, folder, None)
    why = reason or _told(decision)
    entry = registry.move(alias, challenger, seen, why, folder, forced=forced)
    return Outcome(challenger, champion, decision, folder, entry)


def beside(registry: Registry, evalset: str | None = None) -> Look:
    """Look for evaluations that lie beside the versions.

    Args:
        registry: where they lie.
        evalset: hash of the evaluation set; default: the only one both were evaluated on.
    """

    def look(champion: Version | None, candidate: Version) -> Evidence | None:
        sides = [candidate] if champion is None else [candidate, champion]
        both = set.intersection(*(set(registry.evaluations(side)) for side in sides))
        if evalset is None and len(both) > 1:
            raise RunRefused(f"choose one with --evalset: {', '.join(sorted(both))}")
        if evalset is None and not both:
            return None
        chosen = evalset or both.pop()
        old = None if champion is None else tables_for(champion, chosen)
        return Evidence(old, tables_for(candidate, chosen))

    return look


def _refuse_others(evidence: Evidence, champion: Version | None, candidate: Version) -> None:
    """Refuse evaluations of other models, or on different sets, where they say so."""
    sides = [(evidence.candidate, candidate)]
    if evidence.champion is not None and champion is not None:
        sides.append((evidence.champion, champion))
    if (evidence.champion is None) != (champion is None):
        there = "no champion" if champion is None else f"a champion, {champion.path}"
        raise RunRefused(f"there is {there}: give the evaluation of the champion accordingly")
    for table, version in sides:
        bundle = description(table).get("bundle", version.sha256)
        if bundle != version.sha256:
            raise RunRefused(
                f"that is the evaluation of bundle {bundle[:12]}, {version.path} is "
                f"{version.sha256[:12]}; evaluate {version.reference}"
            )
    sets = {description(table).get("evalset") for table, _ in sides}
    if len(sets) > 1:
        raise RunRefused(
            f"the evaluations are of different sets ({', '.join(map(str, sets))}); "
            "evaluate both on the newest"
        )


def _record(
    decision: Decision,
    champion: Version | None,
    candidate: Version,
    evidence: Evidence,
    alias: str,
    reason: str | None,
    *,
    forced: bool,
) -> Callable[[str], tuple[bytes, bytes]]:
    about = {
        "candidate": candidate.reference,
        "candidate_sha256": candidate.sha256,
        "champion": champion.reference if champion else None,
        "champion_sha256": champion.sha256 if champion else None,
        "alias": alias,
        "evalset": description(evidence.candidate).get("evalset"),
        "when": now(),
        "forced": forced,
        "reason": reason,
        "token": uuid.uuid4().hex,
    }
    return lambda folder: decision_record(decision, {"folder": folder, **about})


def _told(decision: Decision | None) -> str:
    """The evidence in one line, as a reason."""
    if decision is None or decision.probability is None:
        return "the first"
    main = decision.reasons[0]
    return (
        f"mIoU {decision.champion_miou:.4f} → {decision.candidate_miou:.4f} on {decision.images} "
        f"images, difference {main.low:+.4f} … {main.high:+.4f}"
    )
