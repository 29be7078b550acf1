"""Check a run byte by byte, from its folder alone: every object, hash, count and statistic."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import tyro

from jobs import ended
from pipeline.errors import EXIT_DONE, EXIT_UNFINISHED
from pipeline.ledger import Ledger
from pipeline.storage import open_store
from pipeline.verify import Findings, verify

SHOWN = 50  # problems on a terminal; --json has all


def check(
    run: Annotated[str, tyro.conf.Positional],
    json: bool = False,
) -> int:
    """Check every object, hash, count and statistic of a run.

    Args:
        run: the run folder, a local path or s3://bucket/prefix.
        json: machine-readable, one object with all findings.

    Returns:
        0 all is as the run says, 4 something is wrong or pending.
    """
    findings = verify(Ledger.open(open_store(run)))
    sys.stdout.write(_as_json(findings) if json else _as_text(findings))
    return EXIT_UNFINISHED if findings.problems or findings.pending else EXIT_DONE


def _as_json(findings: Findings) -> str:
    return json.dumps(asdict(findings)) + "\n"


def _as_text(findings: Findings) -> str:
    lines = [f"WRONG  {problem}" for problem in findings.problems[:SHOWN]]
    if len(findings.problems) > SHOWN:
        lines.append(f"… and {len(findings.problems) - SHOWN} more")
    megapixels = findings.pixels / 1e6
    checked = (
        f"{findings.objects} fragments, {findings.images} images, {megapixels:.1f} MP read again"
    )
    verdict = (
        f"{len(findings.problems)} problems" if findings.problems else "all is as the run says"
    )
    if findings.debris:
        verdict += f"; {findings.debris} half-written objects of killed writers, which nobody reads"
    if findings.pending:
        verdict += f"; {findings.pending} fragments are pending"
    return "\n".join([*lines, f"{checked}: {verdict}"]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    return ended(lambda: tyro.cli(check, prog="maskfleet verify", args=arguments))


if __name__ == "__main__":
    sys.exit(main())
