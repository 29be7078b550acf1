"""How far a run is, from the folder alone: no driver needs to be alive."""

import time
from collections import Counter
from dataclasses import dataclass

from pipeline.finalize import superseded
from pipeline.ledger import Ledger

WINDOW_S = 600.0  # the rate is that of the ten minutes before the last commit


@dataclass(frozen=True, slots=True)
class Status:
    """Counts of live images; every planned image is in exactly one of done, rejected, pending."""

    run: str
    model: str
    rounds: int
    planned: int
    done: int
    rejected: dict[str, int]
    pending: int
    fragments: int
    committed: int
    megapixels: float
    per_second: float | None
    """Images per second lately; None while fewer than two fragments are committed."""
    eta_s: float | None
    last_commit_s_ago: float | None
    finished: bool
    """Whether the newest round has its manifest."""


def status(ledger: Ledger, clock: float | None = None) -> Status:
    """Read plan and headers of the commits.

    Args:
        ledger: an existing run.
        clock: seconds since 1970; now, unless a test says otherwise.
    """
    rounds, commits = ledger.rounds(), ledger.commits()
    tables = [ledger.fragments(n) for n in rounds]
    planned = {row["fragment"]: row["images"] for table in tables for row in table.to_pylist()}
    dropped = superseded(ledger, rounds)
    reasons: Counter[str] = Counter()
    done = pixels = stale = 0
    landed = []
    known = [commits[f] for f in sorted(commits) if f in planned]
    for commit, header in ledger.headers(known):
        about = header.about
        landed.append((commit.found.mtime, about["n_done"] + about["n_rejected"]))
        pixels += about["n_pixels"]
        if dropped or about["n_rejected"]:
            images = header.images.select(["image_id", "status", "reason"]).to_pylist()
            live = [row for row in images if row["image_id"] not in dropped]
            stale += len(images) - len(live)
            reasons.update(row["reason"] for row in live if row["status"] == "rejected")
            done += sum(row["status"] == "done" for row in live)
        else:
            done += about["n_done"]
    pending = sum(planned.values()) - sum(planned[c.fragment] for c in known)
    rate = _rate(landed)
    last = max((at for at, _ in landed), default=None)
    now = time.time() if clock is None else clock
    return Status(
        run=ledger.store.uri,
        model=ledger.model_version,
        rounds=len(rounds),
        planned=done + sum(reasons.values()) + pending,
        done=done,
        rejected=dict(sorted(reasons.items())),
        pending=pending,
        fragments=len(planned),
        committed=len(known),
        megapixels=round(pixels / 1e6, 1),
        per_second=rate,
        eta_s=pending / rate if rate and pending else 0.0 if not pending else None,
        last_commit_s_ago=None if last is None else max(0.0, round(now - last, 1)),
        finished=bool(rounds) and ledger.manifests()[-1:] == rounds[-1:],
    )


def _rate(landed: list[tuple[float, int]]) -> float | None:
    if len(landed) < 2:
        return None
    landed = sorted(landed)
    end = landed[-1][0]
    recent = [(at, n) for at, n in landed if end - at <= WINDOW_S]
    # The first fragment of the window began before it: its images count for no time in it.
    seconds = end - recent[0][0]
    return round(sum(n for _, n in recent[1:]) / seconds, 3) if seconds > 0 else None
