"""Check a run again, byte by byte: every object, hash, count, statistic.

Only the run folder is read, never the source. Each finding is a sentence that names the object.
Nothing is repaired here: a damaged fragment is mended by deleting its object and running the same
`segment` command again.
"""

# pyarrow.compute makes its functions when it is imported; no type checker can see them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import REASONS, RunRefused, StorageMissing
from pipeline.finalize import final_schemas, final_tables, in_manifest
from pipeline.fragment import (
    FragmentDamaged,
    Header,
    check_data,
    decompress,
    read_header,
    read_index,
)
from pipeline.keys import printable
from pipeline.large import committed_region
from pipeline.layout import (
    LEVELS,
    MASKS,
    REGION,
    large_array_json,
    large_group_json,
)
from pipeline.ledger import CARD, FORECAST, RUN, WEIGHTS, Commit, Ledger
from pipeline.plan import SCHEMA, fragments_table
from pipeline.records import Array
from pipeline.storage import PREFLIGHT, ObjectUnreadable
from pipeline.tables import read_table

GONE = (StorageMissing, ObjectUnreadable)  # an object that is not there, or cannot be read any more
AT_ONCE = 4  # whole objects in memory at a time
SUM_MAY_MISS = 1e-3  # float32, thousands of classes
PLACES = ("pixel_start", "mask_index", "path", "byte_offset", "byte_nbytes")
OF_MASKS = (*PLACES, "nodata_pixels", "seam_score")
"""Columns of the images table that only a mask fills."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What verify has to say."""

    problems: list[str]
    """Wrong: something that the run says is not so."""
    pending: int
    """Planned fragments that are not committed (not a fault)."""
    objects: int
    images: int
    pixels: int
    debris: int
    """Objects that killed writers left half-written: not a fault, and nobody reads them."""


def verify(ledger: Ledger) -> Findings:
    """Read everything and say what is wrong."""
    problems = list(_bundle(ledger))
    try:
        plans = {n: ledger.plan(n) for n in ledger.rounds()}
        problems += list(_plans(ledger, plans))
    except (pa.ArrowException, OSError) as error:  # without a plan the rest means nothing
        problems.append(f"plan/: {', '.join(_unreadable(ledger))}: {error}")
        return Findings(problems, 0, 0, 0, 0, 0)
    problems += list(_array(ledger))
    planned = _by_fragment(plans)
    commits = ledger.commits()
    listed = [found.path for found in ledger.store.list()]
    problems += list(_strangers(ledger, listed, plans, planned))
    trials = sum(path.startswith(PREFLIGHT) for path in listed)
    debris = trials + sum(1 for _ in ledger.store.unfinished())
    known = [commits[f] for f in sorted(commits) if f in planned]
    images = pixels = 0
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="verify") as pool:
        for start in range(0, len(known), AT_ONCE):
            part = known[start : start + AT_ONCE]
            for found, count, area in pool.map(
                lambda c: _fragment(ledger, c, planned[c.fragment]), part
            ):
                problems += found
                images += count
                pixels += area
    pending = len(planned) - len(known)
    if not pending and not problems:
        problems += list(_final(ledger))
    return Findings(problems, pending, len(known), images, pixels, debris)


def _bundle(ledger: Ledger) -> Iterator[str]:
    try:
        ledger.bundle_files()
    except (RunRefused, *GONE) as error:
        yield f"bundle/: {error}"


def _plans(ledger: Ledger, plans: dict[int, pa.Table]) -> Iterator[str]:
    next_id = next_fragment = 0
    if list(plans) != list(range(len(plans))):
        yield f"plan/: rounds {list(plans)} have a gap"
    for number, plan in plans.items():
        if plan.schema.names != SCHEMA.names:
            yield f"plan/{number:03d}.parquet: unexpected columns {plan.schema.names}"
            continue
        asked = plan.filter(pc.greater_equal(plan["fragment"], 0))
        ids, fragments = asked["image_id"].to_numpy(), asked["fragment"].to_numpy()
        if not np.array_equal(ids, np.arange(next_id, next_id + len(ids))):
            yield f"plan/{number:03d}.parquet: image_id does not go on from {next_id} without gaps"
        if len(fragments) and (
            fragments[0] != next_fragment
            or np.any((np.diff(fragments) < 0) | (np.diff(fragments) > 1))
        ):
            where = f"plan/{number:03d}.parquet"
            yield f"{where}: fragments do not go on from {next_fragment} without gaps"
        if not ledger.stored_fragments(number).equals(fragments_table(plan)):
            yield f"plan/{number:03d}.fragments.parquet: does not say what the plan says"
        next_id += len(ids)
        next_fragment = int(fragments[-1]) + 1 if len(fragments) else next_fragment


def _unreadable(ledger: Ledger) -> Iterator[str]:
    for found in ledger.store.list("plan"):
        try:
            with ledger.plan_file(found.path) as file:
                read_table(file)
        except (pa.ArrowException, OSError):
            yield found.path


def _strangers(
    ledger: Ledger,
    listed: list[str],
    plans: dict[int, pa.Table],
    planned: dict[int, list[tuple[int, str]]],
) -> Iterator[str]:
    """Objects that no run has, or that no plan asks for."""
    layout = ledger.layout
    ours = {RUN, FORECAST, CARD, WEIGHTS, "receipt.json", "overview.png", *ledger.array_files()}
    ours |= {f"final/{name}.parquet" for name in final_schemas(layout)}
    numbers = {
        "round": plans.keys(),
        "fragment": planned.keys(),
        "image": {image_id for asked in planned.values() for image_id, _ in asked},
    }
    for path in listed:
        if path in ours or path.startswith(PREFLIGHT):
            continue
        if path.startswith(f"{layout.commits}/"):
            if layout.fragment_at(path) not in planned:
                yield f"{printable(path)}: committed, but no plan asks for it"
            continue
        match = _NUMBERED.match(path)
        if match is None or match.lastgroup is None:
            yield f"{printable(path)}: is no part of a run; who put it there?"
        elif int(match[match.lastgroup]) not in numbers[match.lastgroup]:
            yield f"{path}: there is no such {match.lastgroup}"


_NUMBERED = re.compile(
    r"(?:plan|manifest)/(?P<round>\d{3,})(?:\.fragments)?\.(?:parquet|json)$"
    r"|attempts/(?P<fragment>\d+)/\d+$"
    rf"|{MASKS}/large/(?P<image>\d+)/"
)
"""Objects that belong to a round, a fragment or an image, by its number."""


def _array(ledger: Ledger) -> Iterator[str]:
    for path, data in ledger.array_files().items():
        if ledger.store.stat(path) is None:
            yield f"{path} is missing; run segment again"
        elif ledger.store.read(path) != data:
            yield f"{path}: does not say what the plan says; run segment again"


def _by_fragment(plans: dict[int, pa.Table]) -> dict[int, list[tuple[int, str]]]:
    planned: dict[int, list[tuple[int, str]]] = {}
    for plan in plans.values():
        columns = (plan[name].to_pylist() for name in ("fragment", "image_id", "key"))
        for fragment, image_id, key in zip(*columns, strict=True):
            if fragment >= 0:
                planned.setdefault(fragment, []).append((image_id, key))
    return planned


def _fragment(
    ledger: Ledger, commit: Commit, planned: list[tuple[int, str]]
) -> tuple[list[str], int, int]:
    """Problems of one fragment, its images and its pixels."""
    try:
        data = ledger.store.read(commit.path)
        header = read_header(data)
        check_data(data, header)
        index = read_index(data, ledger.layout.index_entries)
    except (FragmentDamaged, *GONE) as error:
        return [f"{commit.path}: {error}; delete it and run segment again"], 0, 0
    problems = list(_tables(ledger, commit, header, planned))
    if not ledger.layout.has_masks:
        problems += [f"{commit.path}: {text}" for text in _predictions(ledger, data, header)]
        done = header.images.filter(pc.equal(header.images["status"], "done"))
        area = pc.sum(pc.multiply(done["height"].cast("int64"), done["width"])).as_py() or 0
        return problems, header.images.num_rows, area
    stats: dict[int, dict[int, dict[str, Any]]] = {}
    for row in header.class_stats.to_pylist():
        stats.setdefault(row["image_id"], {})[row["class_id"]] = row
    pixels = 0
    for row in header.images.to_pylist():
        where = f"{commit.path}: image {row['image_id']} ({printable(row['key'])})"
        if row["status"] == "done":
            problems += [
                f"{where}: {text}"
                for text in _image(ledger, data, header, index, row, stats.get(row["image_id"], {}))
            ]
            pixels += row["height"] * row["width"]
        elif row["image_id"] in stats:
            problems.append(f"{where}: rejected, yet it has statistics")
    return problems, header.images.num_rows, pixels


def _tables(
    ledger: Ledger, commit: Commit, header: Header, planned: list[tuple[int, str]]
) -> Iterator[str]:
    said = list(
        zip(header.images["image_id"].to_pylist(), header.images["key"].to_pylist(), strict=True)
    )
    if said != planned:
        other = f"other ones than the {len(planned)} of the plan"
        yield f"{commit.path}: holds {len(said)} images, {other}"
    if header.about.get("fragment") != commit.fragment:
        yield f"{commit.path}: says it is fragment {header.about.get('fragment')}"
    states = header.images["status"].to_pylist()
    if (states.count("done"), states.count("rejected")) != (
        header.about["n_done"],
        header.about["n_rejected"],
    ):
        yield f"{commit.path}: its counts are not those of its rows"
    for row in header.images.select(["key", "status", "reason", "model_version"]).to_pylist():
        legal = {"done": (None,), "rejected": REASONS}.get(row["status"], ())
        if row["reason"] not in legal:
            said = f"status {row['status']} with reason {row['reason']}"
            yield f"{commit.path}: {printable(row['key'])}: {said}"
        if row["model_version"] != ledger.model_version:
            yield f"{commit.path}: {printable(row['key'])}: made by {row['model_version']}"


def _predictions(ledger: Ledger, data: bytes, header: Header) -> Iterator[str]:
    """What is wrong with a classifier's fragment."""
    if len(data) != header.nbytes + 4:  # an index of no entries is its checksum alone
        yield f"{len(data) - header.nbytes - 4} bytes lie behind its header"
    if header.predictions is None or header.class_stats.num_rows:
        yield "its tables are not those of a classifier"
        return
    images, rows = header.images.to_pylist(), header.predictions.to_pylist()
    done = [image["image_id"] for image in images if image["status"] == "done"]
    if [row["image_id"] for row in rows] != done:
        yield "its predictions are not one for each image that is done"
        return
    answers = dict(zip(done, rows, strict=True))
    for image in images:
        where = f"image {image['image_id']} ({printable(image['key'])})"
        if any(image[name] is not None for name in OF_MASKS):
            yield f"{where}: says where its mask lies, and there is none"
        if image["status"] == "done":
            wrong = _prediction(ledger, image, answers[image["image_id"]])
            yield from (f"{where}: {text}" for text in wrong)


def _prediction(ledger: Ledger, image: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    sure = np.array(row["probabilities"], np.float32)
    if len(sure) != len(ledger.classes):
        yield f"{len(sure)} probabilities for {len(ledger.classes)} classes"
        return
    if not (np.all(sure >= 0) and abs(float(sure.sum()) - 1) <= SUM_MAY_MISS):
        yield f"its probabilities sum to {sure.sum():.4f}"
    first = int(sure.argmax())
    expected = ledger.classes[first]
    if (row["label"], row["name"]) != (expected["id"], expected["name"]):
        yield f"label {row['label']} ({row['name']}) is not its most probable class"
    if row["confidence"] != sure[first] or image["mean_confidence"] != sure[first]:
        yield f"its confidence {row['confidence']} is not the probability of its label"


def _image(
    ledger: Ledger,
    data: bytes,
    header: Header,
    index: Array,
    row: dict[str, Any],
    stats: dict[int, dict[str, Any]],
) -> Iterator[str]:
    try:
        if row["path"]:
            counts = yield from _large_counts(ledger, row)
        else:
            counts = yield from _slot_counts(ledger, data, header, index, row)
    except (FragmentDamaged, *GONE) as error:
        yield str(error)
        return
    layout, ids = ledger.layout, [entry["id"] for entry in ledger.classes]
    strangers = [
        value for value in np.flatnonzero(counts).tolist() if value not in {*ids, layout.fill}
    ]
    if strangers:
        yield f"values {strangers} are no classes"
    if row["nodata_pixels"] != counts[layout.fill]:
        yield f"nodata_pixels is {row['nodata_pixels']}, the mask has {counts[layout.fill]}"
    said = {class_id: stat["pixel_count"] for class_id, stat in stats.items()}
    real = {class_id: int(counts[class_id]) for class_id in ids if counts[class_id]}
    if said != real:
        yield f"class_stats says {said}, the mask has {real}"
    whole = sum(real.values())
    if any(
        abs(stat["fraction"] - stat["pixel_count"] / max(1, whole)) > 1e-6
        for stat in stats.values()
    ):
        yield "a fraction is not pixel_count over the data pixels"


def _slot_counts(
    ledger: Ledger, data: bytes, header: Header, index: Array, row: dict[str, Any]
) -> Iterator[str]:
    """Counts per value of a mask in slots (as the generator's value)."""
    layout, start = ledger.layout, row["byte_offset"] + header.nbytes
    slot = (
        row["mask_index"] % layout.slots
        if layout.kind == "stacked"
        else row["pixel_start"] // layout.slot % layout.slots
    )
    flat = []
    for number, nbytes in enumerate(row["byte_nbytes"]):
        if index[slot + number].tolist() != [start, nbytes]:
            yield f"slot {slot + number} is not where the table says"
        flat.append(decompress(memoryview(data)[start : start + nbytes], layout.dtype))
        start += nbytes
    values = np.concatenate(flat)
    area = row["height"] * row["width"]
    if len(values) < area:
        yield f"{len(values)} pixels are stored of {area}"
    if np.any(values[area:] != layout.fill):
        yield "the rest of its last slot is not empty"
    return np.bincount(values[:area], minlength=layout.fill + 1)


def _large_counts(ledger: Ledger, row: dict[str, Any]) -> Iterator[str]:
    """Counts per value of a large mask, region by region (as the generator's value)."""
    layout = ledger.layout
    counts = np.zeros(layout.fill + 1, np.int64)
    yield from _large_metadata(ledger, row)
    for y in range(-(-row["height"] // REGION)):
        for x in range(-(-row["width"] // REGION)):
            path = f"{row['path']}/0/c/{y}/{x}"
            shape = (
                min(REGION, row["height"] - y * REGION),
                min(REGION, row["width"] - x * REGION),
            )
            labels, about = committed_region(ledger.store, path, shape, layout.dtype, layout.fill)
            counts += np.bincount(labels.ravel(), minlength=layout.fill + 1)
            real = [int((labels == entry["id"]).sum()) for entry in ledger.classes]
            if about["counts"] != real:
                yield f"{path}: its header counts {about['counts']}, its pixels {real}"
            for level in range(1, LEVELS):
                path = f"{row['path']}/{level}/c/{y}/{x}"
                expected = labels[:: 2**level, :: 2**level]
                again, _ = committed_region(
                    ledger.store, path, expected.shape, layout.dtype, layout.fill, level
                )
                if not np.array_equal(again, expected):
                    yield f"{path}: is not made of the pixels of level 0"
            if layout.confidence:
                path = f"{row['path']}/confidence/c/{y}/{x}"
                committed_region(ledger.store, path, shape, "uint8", 0)
    return counts


def _large_metadata(ledger: Ledger, row: dict[str, Any]) -> Iterator[str]:
    layout = ledger.layout
    size = row["height"], row["width"]
    expected = {
        str(level): large_array_json(*size, level, layout.dtype, layout.fill)
        for level in range(LEVELS)
    }
    if layout.confidence:
        expected["confidence"] = large_array_json(*size, 0, "uint8", 0)
    expected["."] = large_group_json(ledger.classes, layout.fill, row["uri"])
    for folder, data in expected.items():
        path = f"{row['path']}/{folder}/zarr.json".replace("/./", "/")
        if ledger.store.stat(path) is None:
            yield f"{path} is missing"
        elif ledger.store.read(path) != data:
            yield f"{path}: does not say what it said when it was written"


def _final(ledger: Ledger) -> Iterator[str]:
    """The tables people query, against the commits and against their manifest."""
    manifests = ledger.manifests()
    if manifests != ledger.rounds():
        rounds = f"finished rounds {manifests}, planned {ledger.rounds()}"
        yield f"manifest/: {rounds}; run segment again"
        return
    place = f"manifest/{manifests[-1]:03d}.json" if manifests else ""
    made, counts = final_tables(ledger, manifests)
    try:
        manifest = ledger.manifest(manifests[-1])
        wrong = [k for k, v in in_manifest(counts).items() if manifest["counts"][k] != v]
        hashes = {name: manifest["tables"][name]["sha256"] for name in made}
    except (ValueError, KeyError, TypeError) as error:
        yield f"{place} is damaged ({error!r}); delete it and run segment again"
        return
    yield from (f"{place}: {key} is not what the fragments say" for key in wrong)
    twice = _twice(read_table(made["images"][0], ["key"]))
    yield from (f"final/images.parquet: {printable(key)} has two live rows" for key in twice)
    for name, (fresh, _) in made.items():
        try:
            stored = ledger.store.read(f"final/{name}.parquet")
        except GONE as error:
            yield f"final/{name}.parquet: {error}; run segment again"
            continue
        if hashlib.sha256(stored).hexdigest() != hashes[name]:
            yield f"final/{name}.parquet: its SHA-256 is not the one in {place}"
        elif not _content(stored).equals(_content(fresh)):
            yield f"final/{name}.parquet: is not what the fragments say"


def _twice(images: pa.Table) -> list[str]:
    """Keys that have more than one live row."""
    counts = pc.value_counts(images["key"].combine_chunks())
    return [count["values"].as_py() for count in counts if count["counts"].as_py() > 1]


def _content(data: bytes) -> pa.Table:
    """A final table without what only its store knows: a copy of a run has other etags."""
    table = read_table(data)
    return table.drop_columns("etag") if "token" in table.column_names else table
