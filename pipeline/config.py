"""Every knob of a run, in the order the data meets it. File, flag and help are generated from here.

A YAML file gives the same names (``tile: {size: 512}``), a flag wins over the file
(``--tile.size 512``). Unknown names are refused with the nearest one.
"""

import difflib
import hashlib
import json
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import REASONS, RunRefused


class _Knobs(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Fragments(_Knobs):
    """How the archive is cut into units of work, retry and commit."""

    bytes: int = Field(default=64 * 1024**2, ge=1)
    """Encoded bytes of a fragment at most."""
    images: int = Field(default=1024, ge=1)
    """Images of a fragment at most; small archives get smaller fragments (a 64th, at least 16)."""


class Decode(_Knobs):
    """What is still taken for a picture."""

    max_bytes: int = Field(default=512 * 1024**2, ge=1)
    """Encoded bytes; more is rejected as too_large."""
    max_pixels: int = Field(default=256_000_000, ge=1)
    """Height times width; more is rejected as too_large."""


class Tile(_Knobs):
    """How a picture that is too large for one pass is cut and put together again."""

    size: int | None = Field(default=None, ge=16)
    """Side of a tile in pixels; default: the model bundle's, else 1024."""
    overlap: int | None = Field(default=None, ge=0)
    """Pixels that neighbouring tiles share; default: the bundle's, else 128.
    More hides seams and costs (size / (size - overlap))² work."""
    taper: Literal["gaussian", "linear"] = "gaussian"
    """Weight of a tile's scores, from its centre to its border, where tiles overlap."""


class Batch(_Knobs):
    """How tiles of many pictures share one pass of the model."""

    pixels: int | None = Field(default=None, ge=1)
    """Padded pixels of a batch at most; default: on GPUs found by a probe when a run is created."""
    window_mb: int = Field(default=512, ge=1)
    """Decoded megabytes a fragment may hold while its batches fill."""
    mix: bool = False
    """Fragments in flight share batches: fuller ones on a GPU where pictures have many sizes, but
    the last bits of an answer may then depend on what else is in flight. On a CPU: no difference.
    """


class Inference(_Knobs):
    """How the model computes. The plain choices are exact; the others trade labels for speed."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32: products of 11 bits, several times faster on GPUs that know them (on a CPU: fp32).
    bf16: half the memory too, and faster where the hardware knows it. Some labels differ
    (docs/models.md says how many)."""
    compile: bool = False
    """Compile the model for the shapes it meets (torch.compile): pays in long runs of few sizes."""


class Compute(_Knobs):
    """What may be used to do the work. Does not change the answers."""

    workers: int | None = Field(default=None, ge=1)
    """Segmenting workers; default: one per GPU, else one per core. On Ray more than there are GPUs
    share them; in one process they are the fragments it works on at a time."""
    decode_threads: int | None = Field(default=None, ge=0)
    """Threads that decode ahead of the model, per worker; default: 2 beside a GPU, none on a CPU,
    where a worker decodes what it is about to segment itself."""
    fetch_threads: int = Field(default=16, ge=1)
    """Requests in flight while a fragment's bytes are fetched."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: a GPU where there is one."""
    image_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds for one image once its fragment has failed before; then it is rejected as timeout."""
    image_memory_mb: int = Field(default=8192, ge=256)
    """Memory for one image once its fragment has failed before; then it is rejected as killed."""
    object_store_mb: int = Field(default=512, ge=80)
    """Ray's shared memory of --on local, in megabytes: beside GPUs, how far fetching runs ahead."""
    no_progress_s: int = Field(default=3600, ge=5)
    """A run in which nothing moves for so long stops, resumably (Ray: no fragment passes a leg)."""


class SegmentConfig(_Knobs):
    """Segment every image below SOURCE into the run folder OUT, each exactly once."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder or prefix that holds the images: a local path or s3://bucket/prefix."""
    out: str
    """The run folder: a local path or s3://bucket/prefix. The same command again resumes it."""
    model: str = "demo"
    """A model bundle, a transformers checkpoint (folders or s3:// prefixes), an .onnx file,
    champion@REGISTRY or NAME/v0007@REGISTRY (a version of a registry), or `demo`."""
    architecture: str | None = None
    """The module that the bundle's card names as its architecture, e.g. acme.nets.unet: runs the
    code of that module. On the command line only."""
    on: str | None = None
    """`process` (this one), `local` (Ray on this machine) or the address of a Ray cluster.
    Default: the surrounding cluster inside a Ray job, else process for small archives, local
    beyond."""
    limit: int | None = Field(default=None, ge=1)
    """Plan at most so many images (the first ones, by key)."""
    include: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only keys that match one of these globs (`*` crosses `/`)."""
    exclude: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """No keys that match one of these globs."""
    format: str = "auto"
    """`files`, `webdataset` or `parquet`; auto: by content and name."""
    retry: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Try images again that were rejected for these reasons (a new round)."""
    allow_removals: bool = False
    """Let a round drop more than half of the images because they are no longer there."""
    dry_run: bool = False
    """Plan, count and check everything, then stop before writing anything."""
    layout: Literal["flat", "stacked"] = "flat"
    """flat: every mask at its own size; stacked: one [N,H,W] array of masks of one size."""
    size: str | None = Field(default=None, pattern=r"^\d+x\d+$")
    """HxW of the stacked layout; default: the size all probed images share."""
    confidence: bool = False
    """Store each pixel's confidence (uint8, 255 = certain) beside its class."""
    slot_bytes: int | None = Field(default=None, ge=4096)
    """Pixels of one inner chunk of the flat layout, a multiple of 4096; default: what nine of ten
    probed images fit into."""
    log: Literal["auto", "text", "json"] = "auto"
    """auto: a live bar on a terminal, plain lines elsewhere."""
    interval_s: float = Field(default=10.0, gt=0)
    """Seconds between progress lines where there is no terminal."""
    fragment: Fragments = Fragments()
    decode: Decode = Decode()
    tile: Tile = Tile()
    batch: Batch = Batch()
    inference: Inference = Inference()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _sensible(self) -> "SegmentConfig":
        for reason in self.retry:
            if reason not in REASONS:
                near = difflib.get_close_matches(reason, REASONS, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"--retry {reason} is not a reason for rejection{hint} ({', '.join(REASONS)})"
                )
        if self.size and self.layout != "stacked":
            raise ValueError("--size belongs to --layout stacked; drop one or add the other")
        if self.confidence and self.layout == "stacked":
            raise ValueError("--confidence needs the flat layout; drop --layout stacked")
        if self.tile.size and self.tile.overlap and self.tile.overlap * 2 > self.tile.size:
            raise ValueError(
                f"--tile.overlap {self.tile.overlap} must be at most half of "
                f"--tile.size {self.tile.size}; try {self.tile.size // 8}"
            )
        if self.slot_bytes and self.slot_bytes % 4096:
            raise ValueError(f"--slot-bytes {self.slot_bytes} must be a multiple of 4096")
        return self

    def identity(self) -> dict[str, Any]:
        """The knobs that decide what a run holds; a run folder belongs to one such set.

        ``--on``, ``--limit``, ``--retry``, ``--allow-removals``, compute and logging may differ
        from call to call.
        """
        free = {
            "on",
            "out",
            "model",
            "limit",
            "retry",
            "allow_removals",
            "dry_run",
            "log",
            "interval_s",
            "compute",
        }
        return self.model_dump(mode="json", exclude=free)


def fingerprint(values: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON-able dictionary, independent of key order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def from_mapping(values: dict[str, Any]) -> SegmentConfig:
    """A checked config.

    Raises:
        RunRefused: naming every wrong entry, the value, and the nearest name for unknown ones.
    """
    try:
        return SegmentConfig.model_validate(values)
    except ValidationError as error:
        raise RunRefused("; ".join(_sentence(e) for e in error.errors())) from error


def _sentence(error: Any) -> str:  # noqa: ANN401 - pydantic's error dictionary
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, known_names(), 1, cutoff=0.5)
        return f"unknown config key {where!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {error['input']!r})" if where else message


def known_names() -> list[str]:
    """Every config key, dotted."""
    names: list[str] = []
    for name, field in SegmentConfig.model_fields.items():
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return names
