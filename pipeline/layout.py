"""Where masks lie inside ``masks.zarr``: plain Zarr v3 metadata, and the arithmetic of places.

flat     ``mask`` is 1-D; fragment f owns shard ``c/f``; an image begins on a slot (inner chunk).
         With confidence it is [2, pixels]: row 0 classes, row 1 confidence, shard ``c/0/f``.
stacked  ``mask`` is [N,H,W]; a slot is one image; shard ``c/f/0/0``.
large    ``large/<image_id>/0…3``: sharded 2-D arrays with OME-Zarr 0.5 label metadata.

Where a classifier runs there are no masks and no ``masks.zarr``:

labels   fragment f is ``predictions/c/f``, a header with its tables and nothing behind it.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.fragment import LEVEL

MASKS = "masks.zarr"
ARRAY = f"{MASKS}/mask"
PREDICTIONS = "predictions"
N_SLOTS = 4096  # index of 64 KiB a fragment; room for 4 slots an image at 1024 images
REGION, INNER, LEVELS = (
    4096,
    512,
    4,
)  # STORE §3.2: viewer tiles of 512, one owner for all levels of a region

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one run lays out its answers; frozen in run.json."""

    kind: Literal["flat", "stacked", "labels"]
    dtype: str
    fill: int
    slots: int
    """Slots of a fragment."""
    slot: int
    """Pixels of a slot (flat), or H * W (stacked)."""
    height: int = 0
    width: int = 0
    confidence: bool = False

    @property
    def has_masks(self) -> bool:
        """Whether answers are masks; else one class per picture."""
        return self.kind != "labels"

    def slots_for(self, height: int, width: int) -> int | None:
        """Slots a mask takes, or None where it cannot lie in slots at all."""
        if self.kind == "stacked":
            return 1 if (height, width) == (self.height, self.width) else None
        return -(-height * width // self.slot)

    @property
    def index_entries(self) -> int:
        """Inner chunks of a fragment's shard."""
        return self.slots * (2 if self.confidence else 1)

    @property
    def commits(self) -> str:
        """The folder of the objects that commit fragments."""
        return f"{ARRAY if self.has_masks else PREDICTIONS}/c"

    def commit_path(self, fragment: int) -> str:
        """The object that commits a fragment."""
        if self.kind == "stacked":
            return f"{self.commits}/{fragment}/0/0"
        return f"{self.commits}/0/{fragment}" if self.confidence else f"{self.commits}/{fragment}"

    def fragment_at(self, path: str) -> int | None:
        """The fragment whose commit lies at a path of a listing, or None for anything else."""
        parts = path.removeprefix(f"{self.commits}/").split("/")
        number = parts[1] if self.confidence and len(parts) > 1 else parts[0]
        return int(number) if number.isdigit() and self.commit_path(int(number)) == path else None

    def array_json(self, fragments: int, attributes: Json) -> bytes:
        """``mask/zarr.json`` of a run with so many fragments."""
        if self.kind == "stacked":
            shape = [fragments * self.slots, self.height, self.width]
            shard = [self.slots, self.height, self.width]
            inner, names = [1, self.height, self.width], ["image", "y", "x"]
        else:
            run = self.slots * self.slot
            shape, shard, inner, names = [fragments * run], [run], [self.slot], ["pixel"]
            if self.confidence:
                shape, shard, inner, names = (
                    [2, *shape],
                    [2, *shard],
                    [1, *inner],
                    ["value", *names],
                )
        return array_json(shape, shard, inner, names, self.dtype, self.fill, attributes)


def array_json(
    shape: list[int],
    shard: list[int],
    inner: list[int],
    names: list[str],
    dtype: str,
    fill: int,
    attributes: Json,
) -> bytes:
    """A sharded Zarr v3 array: zstd with checksum inside, index at the end with crc32c."""
    wide = dtype != "uint8"
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}} if wide else {"name": "bytes"},
        {"name": "zstd", "configuration": {"level": LEVEL, "checksum": True}},
    ]
    sharding = {
        "chunk_shape": inner,
        "codecs": codecs,
        "index_codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "index_location": "end",
    }
    return _bytes(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype,
            "fill_value": fill,
            "dimension_names": names,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": attributes,
            "storage_transformers": [],
        }
    )


def group_json(attributes: Json) -> bytes:
    """A Zarr v3 group."""
    return _bytes({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def class_attributes(classes: list[Json], fill: int) -> Json:
    """CF flag attributes and the ontology, for readers that know nothing of us."""
    return {
        "flag_values": [entry["id"] for entry in classes],
        "flag_meanings": " ".join(entry["name"].replace(" ", "_") for entry in classes),
        "ontology": {"classes": classes, "ignore_id": fill},
    }


def large_path(image_id: int) -> str:
    """The group of a large image."""
    return f"{MASKS}/large/{image_id}"


def large_group_json(classes: list[Json], fill: int, source: str) -> bytes:
    """OME-Zarr 0.5 label metadata of a large image (rules: STORE §3.3)."""
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [{"type": "scale", "scale": [2.0**level, 2.0**level]}],
        }
        for level in range(LEVELS)
    ]
    axes = [{"name": name, "type": "space"} for name in ("y", "x")]
    colors = [{"label-value": entry["id"], "rgba": [*entry["color"], 255]} for entry in classes]
    properties = [{"label-value": entry["id"], "class": entry["name"]} for entry in classes]
    label = {
        "version": "0.5",
        "colors": [*colors, {"label-value": fill, "rgba": [0, 0, 0, 0]}],
        "properties": [*properties, {"label-value": fill, "class": "nodata"}],
        "source": {"image": source},
    }
    ome = {
        "version": "0.5",
        "multiscales": [{"name": "mask", "type": "nearest", "axes": axes, "datasets": datasets}],
        "image-label": label,
    }
    return group_json({"ome": ome})


def large_array_json(height: int, width: int, level: int, dtype: str, fill: int) -> bytes:
    """One level of a large image; a level-0 region and its copies in all levels have one owner."""
    step = 2**level
    shape = [-(-height // step), -(-width // step)]
    side = REGION // step
    inner = min(INNER, side)
    return array_json(shape, [side, side], [inner, inner], ["y", "x"], dtype, fill, {})


def _bytes(value: Json) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
