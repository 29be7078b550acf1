"""Pictures that a training could not read: an object each, so that any worker may say so twice."""

import hashlib
import json

import pyarrow as pa

from pipeline.errors import StorageMissing
from pipeline.storage import Store

FOLDER = "rejected"

REJECTED = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("station", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
"""One row per picture that could not be answered."""


def reject(store: Store, key: str, station: str, reason: str, detail: str) -> None:
    """Write down that a picture cannot be read, and why."""
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    said = {"key": key, "station": station, "reason": reason, "detail": detail}
    store.create(f"{FOLDER}/{name}.json", json.dumps(said).encode())


def rejected(store: Store) -> pa.Table:
    """One row per picture."""
    try:
        found = sorted(each.path for each in store.list(FOLDER))
    except StorageMissing:
        found = []
    rows = [json.loads(store.read(path)) for path in found if path.endswith(".json")]
    return pa.Table.from_pylist(rows, REJECTED).sort_by("key")
