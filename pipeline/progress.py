"""What a person sees of a run: a live bar on a terminal, one line per interval elsewhere."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.clock import add
from pipeline.records import Receipt

log = logging.getLogger("maskfleet")

WINDOW_S = 60.0  # the rate shown is that of the last minute: what the ETA should believe


@dataclass(slots=True)
class Tally:
    """What this call has done so far."""

    total: int
    """Images this call has to answer."""
    done: int = 0
    rejected: int = 0
    pixels: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    fragments: int = 0
    adopted: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)
    peak_mb: float = 0.0
    started: float = field(default_factory=time.monotonic)
    first_landed: float | None = None
    first_images: int = 0
    """Images of the fragment that landed first: its work lies before the steady stretch."""
    last_landed: float | None = None
    recent: list[tuple[float, int]] = field(default_factory=list)

    def add(self, receipt: Receipt) -> None:
        """Count a fragment in."""
        now = time.monotonic()
        if self.first_landed is None:
            self.first_landed, self.first_images = now, receipt.done + receipt.rejected
        self.last_landed = now
        self.done += receipt.done
        self.rejected += receipt.rejected
        self.pixels += receipt.pixels
        self.bytes_in += receipt.bytes_in
        self.bytes_out += receipt.bytes_out
        self.fragments += 1
        self.adopted += receipt.adopted
        add(self.seconds, receipt.seconds)
        add(self.busy, receipt.busy)
        self.passed.update(receipt.passed)
        self.peak_mb = max(self.peak_mb, receipt.peak_mb)
        self.recent = [(at, n) for at, n in self.recent if now - at < WINDOW_S]
        self.recent.append((now, receipt.done + receipt.rejected))

    @property
    def steady_s(self) -> float | None:
        """Seconds from the first fragment landed to the last; None if there is no such stretch."""
        first, last = self.first_landed, self.last_landed
        return last - first if first and last and last > first else None

    @property
    def answered(self) -> int:
        """Images with an answer."""
        return self.done + self.rejected

    @property
    def rate(self) -> float:
        """Images per second over the last minute."""
        since = max(self.started, time.monotonic() - WINDOW_S)
        return sum(n for _, n in self.recent) / max(1e-3, time.monotonic() - since)

    @property
    def eta_s(self) -> float | None:
        """Seconds left at that rate; None while nothing is known."""
        return (self.total - self.answered) / self.rate if self.rate > 0 else None


def watched(
    receipts: Iterable[Receipt],
    tally: Tally,
    style: Literal["auto", "text", "json"],
    interval_s: float,
) -> Iterator[Receipt]:
    """Receipts, counted and shown as they pass."""
    if style == "auto" and sys.stderr.isatty():
        yield from _bar(receipts, tally)
        return
    last = time.monotonic()
    for receipt in receipts:
        tally.add(receipt)
        yield receipt
        if time.monotonic() - last >= interval_s:
            last = time.monotonic()
            say(style, "progress", **facts(tally))


def _bar(receipts: Iterable[Receipt], tally: Tally) -> Iterator[Receipt]:
    note = TextColumn("{task.fields[note]}")
    columns = (TextColumn("segmenting"), BarColumn(), MofNCompleteColumn(), note)
    with Progress(*columns, transient=True) as bar:
        shown = bar.add_task("", total=tally.total, note="")
        for receipt in receipts:
            tally.add(receipt)
            bar.update(shown, completed=tally.answered, note=_note(tally))
            yield receipt


def _note(tally: Tally) -> str:
    speed = f"{tally.pixels / 1e6:.0f} MP  {tally.rate:.1f}/s  ETA {duration(tally.eta_s)}"
    return f"{speed}  rejected {tally.rejected}"


def facts(tally: Tally) -> dict[str, object]:
    """A progress line's numbers."""
    return {
        "images": tally.answered,
        "of": tally.total,
        "megapixels": round(tally.pixels / 1e6, 1),
        "per_second": round(tally.rate, 2),
        "eta_s": None if tally.eta_s is None else round(tally.eta_s),
        "rejected": tally.rejected,
    }


def say(style: str, event: str, **values: object) -> None:
    """One line for a log: JSON, or words."""
    if style == "json":
        log.info(json.dumps({"event": event, **values}))
    elif event == "progress":
        log.info(
            "%s of %s images, %s MP, %s/s, ETA %s, %s rejected",
            values["images"], values["of"], values["megapixels"], values["per_second"],
            duration(values["eta_s"]), values["rejected"],
        )  # fmt: skip
    else:
        log.info("%s", values.get("text", event))


def duration(seconds: object) -> str:
    """Seconds as a person says them."""
    if not isinstance(seconds, int | float):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{rest} s"
    )
