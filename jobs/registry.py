"""Look into a registry: list, show, compare, history, rollback; add a model made elsewhere."""

import json as jsons
import sys
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from typing import Annotated, Any

from tyro.conf import Positional
from tyro.extras import subcommand_cli_from_dict

from jobs import ended
from pipeline.create import read_bundle
from pipeline.decision import as_text
from pipeline.errors import EXIT_DONE
from pipeline.promotion import judge
from pipeline.registry import CARD, CHAMPION, Registry, tables_for
from pipeline.storage import open_store
from pipeline.versions import Origin, Version

Row = tuple[str, ...]


def listed(registry: Annotated[str, Positional], json: bool = False) -> int:
    """List the versions of a registry and what its aliases mean.

    Args:
        registry: a local path or s3://bucket/prefix.
        json: machine-readable, one object.
    """
    there = _at(registry)
    versions, aliases = there.versions(), there.aliases()
    if json:
        return _say_json(
            {
                "versions": [asdict(version) for version in versions],
                "aliases": {name: asdict(entry) for name, entry in aliases.items()},
            }
        )
    rows: list[Row] = [("version", "created", "mIoU", "bundle", "parent", "aliases")]
    for version in versions:
        called = [name for name, entry in aliases.items() if entry.version == version.path]
        rows.append(
            (
                version.path,
                version.created,
                _figure(version.metrics.get("miou")),
                version.sha256[:12],
                version.parent or "",
                ", ".join(called),
            )
        )
    return _say(_aligned(rows))


def show(
    registry: Annotated[str, Positional],
    what: Annotated[str, Positional] = CHAMPION,
    json: bool = False,
) -> int:
    """Show all that is known of one version.

    Args:
        registry: a local path or s3://bucket/prefix.
        what: an alias or NAME/v0007.
        json: machine-readable, one object.
    """
    there = _at(registry)
    version = there.meant(what)
    card = jsons.loads(there.store.read(f"{version.path}/{CARD}"))
    called = [name for name, entry in there.aliases().items() if entry.version == version.path]
    known: dict[str, Any] = {
        **asdict(version),
        "reference": version.reference,
        "architecture": card["architecture"],
        "classes": [entry["name"] for entry in card["classes"]],
        "aliases": called,
        "evaluations": there.evaluations(version),
    }
    if json:
        return _say_json(known)
    return _say(_aligned([(name, _plain(value)) for name, value in _flat(known)]))


def compare(
    registry: Annotated[str, Positional],
    one: Annotated[str, Positional],
    other: Annotated[str, Positional],
    json: bool = False,
) -> int:
    """Set two versions side by side, and on the images of an evaluation that both have.

    Args:
        registry: a local path or s3://bucket/prefix.
        one: an alias or NAME/v0007; figures are the other's minus this one's.
        other: an alias or NAME/v0007.
        json: machine-readable, one object.
    """
    there = _at(registry)
    pair = there.meant(one), there.meant(other)
    rows = list(_differences(*pair))
    both = sorted(set.intersection(*(set(there.evaluations(version)) for version in pair)))
    decisions = {
        evalset: judge(*(tables_for(version, evalset) for version in pair)) for evalset in both
    }
    if json:
        return _say_json(
            {
                "versions": [asdict(version) for version in pair],
                "evaluations": {evalset: asdict(found) for evalset, found in decisions.items()},
            }
        )
    lines = _aligned([("", pair[0].path, pair[1].path), *rows])
    for evalset, decision in decisions.items():
        lines += ["", f"on {decision.images} images of {evalset[:12]}:", *as_text(decision)]
    return _say(lines)


def history(
    registry: Annotated[str, Positional],
    alias: Annotated[str, Positional] = CHAMPION,
    json: bool = False,
) -> int:
    """List everything an alias has meant, oldest first.

    Args:
        registry: a local path or s3://bucket/prefix.
        alias: whose history.
        json: machine-readable, one object.
    """
    entries = _at(registry).history(alias)
    if json:
        return _say_json({"entries": [asdict(entry) for entry in entries]})
    rows: list[Row] = [
        (
            str(entry.number),
            entry.when,
            entry.version,
            "forced" if entry.forced else "",
            entry.decision or "",
            entry.reason,
        )
        for entry in entries
    ]
    return _say(_aligned(rows) if rows else [f"{alias} has never meant anything"])


def rollback(
    registry: Annotated[str, Positional],
    alias: Annotated[str, Positional] = CHAMPION,
    to: str | None = None,
    reason: str = "rollback",
) -> int:
    """Let an alias mean again what it meant before; the history keeps both.

    Args:
        registry: a local path or s3://bucket/prefix.
        alias: whose.
        to: a version it has meant (NAME/v0007); default: the one before the present one.
        reason: for whoever reads the history.
    """
    entry = _at(registry).rollback(alias, reason, to)
    return _say([f"{alias} is {entry.version} again (it was {entry.previous})"])


def add(
    registry: Annotated[str, Positional],
    name: Annotated[str, Positional],
    model: Annotated[str, Positional],
) -> int:
    """Put a model that was made elsewhere in, as the next version of a name.

    Args:
        registry: a local path or s3://bucket/prefix; made if the place is empty.
        name: of the model: lower-case letters and digits, with . - _ between them.
        model: what `segment --model` takes.
    """
    bundle = read_bundle(model)
    # Its hash is the training's id: the same model again is the same version.
    training, metrics = sha256(bundle[0]).hexdigest(), jsons.loads(bundle[0])["metrics"]
    origin = Origin(training=f"added {training}", metrics=metrics)
    version = Registry.found(open_store(registry)).publish(name, bundle, origin)
    return _say([f"{version.reference} ({version.sha256[:12]})"])


# ------------------------------------------------------------------------------ how it is said


def _at(registry: str) -> Registry:
    return Registry.open(open_store(registry))


def _differences(one: Version, other: Version) -> Iterator[Row]:
    facts = [dict(_flat(asdict(version))) for version in (one, other)]
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        values = [_plain(fact.get(name)) for fact in facts]
        if values[0] != values[1] or name.startswith("metrics."):
            yield name, *values


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return "" if value is None else str(value)


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else _plain(value)


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ((c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def _say(lines: list[str]) -> int:
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_DONE


def _say_json(value: dict[str, Any]) -> int:
    return _say([jsons.dumps(value)])


COMMANDS = {
    "list": listed,
    "show": show,
    "compare": compare,
    "history": history,
    "rollback": rollback,
    "add": add,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    return ended(
        lambda: subcommand_cli_from_dict(
            COMMANDS, prog="maskfleet registry", description=__doc__, args=arguments
        )
    )


if __name__ == "__main__":
    sys.exit(main())
