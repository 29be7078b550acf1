"""What is simulated: the work, and the cluster that does it. Every figure says whence it comes.

The fields are also the command's flags, and what they say is its help.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


def figure(default: float, origin: str) -> Any:
    """A field with its default and where that comes from."""
    return dataclasses.field(default=default, metadata={"origin": origin})


MEGAPIXELS = 0.17  # a picture of camvid, which benchmarks.limit measured (RESULTS.md, 2026-11-20)


@dataclass(frozen=True, slots=True)
class Work:
    """An archive, and what its pictures cost on a core."""

    pictures: int = figure(10**8, "how many there are")
    fragment_pictures: int = figure(
        512, "pictures of a fragment: 64 MiB at the most (DESIGN §1), 51 MB of pictures of 100 kB"
    )
    encoded_bytes: float = figure(100e3, "mean bytes of an encoded picture; assumed")
    decode_seconds: float = figure(
        MEGAPIXELS * 4.4e-3, "of a core, a picture: 0.17 MP at 4.4 ms/MP, by benchmarks.limit"
    )
    encode_seconds: float = figure(
        MEGAPIXELS * 1.2e-3, "of a core, a picture: 0.17 MP at 1.2 ms/MP, by benchmarks.limit"
    )

    @property
    def fragments(self) -> int:
        """All of them; the last may be smaller."""
        return -(-self.pictures // self.fragment_pictures)

    def size(self, fragment: int) -> int:
        """Pictures of a fragment."""
        return min(self.fragment_pictures, self.pictures - fragment * self.fragment_pictures)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes, the store they read and write, and the driver that tells them what to do."""

    gpus: int = figure(64, "GPUs of all nodes")
    gpus_per_node: int = figure(8, "as cloud machines with many GPUs have them")
    gpu_rate: float = figure(
        1500, "pictures a second that a GPU predicts; assumed: there was no GPU to measure"
    )
    fragments_in_flight: int = figure(4, "per GPU; pipeline.cluster.GPU_THREADS")
    cores: int = figure(64, "cores of a node; assumed")
    decode_threads: int = figure(2, "threads that decode a fragment; compute.decode_threads")
    network: float = figure(25e9, "bits a second into a node; assumed")
    loads: int = figure(
        64, "load tasks of a node at once; assumed: Ray would start 240, at LOAD_CPUS a task"
    )
    loaded: int = figure(64, "loaded fragments that may wait on a node: 3.3 GB of its object store")
    requests: int = figure(16, "requests in flight of a load task; compute.fetch_threads")
    latency_seconds: float = figure(
        0.05, "median of a request; assumed (STORE §6 quotes 0.1-0.2 as typical first byte)"
    )
    latency_tail: float = figure(
        0.7,
        "sigma of the log-normal latency; assumed: one in a hundred takes five times the median",
    )
    get_rate: float = figure(5500, "GETs a second of a prefix (STORE §6, AWS)")
    put_rate: float = figure(3500, "PUTs a second of a prefix (STORE §6, AWS)")
    get_pictures: float = figure(
        1, "pictures a GET brings; 1 from loose files and tar shards (pipeline.fetching)"
    )
    source_prefixes: int = figure(1, "prefixes the source spreads over; S3 splits a hot one itself")
    run_prefixes: int = figure(1, "prefixes the run folder spreads over")
    driver_seconds: float = figure(0.005, "of the driver, a fragment, one after another; assumed")
    losses: float = figure(1 / 24, "losses of a node in an hour; assumed")
    detection_seconds: float = figure(15, "until Ray notices a lost node (RAY §3)")
    replacement_seconds: float = figure(180, "until another has taken its place; assumed")

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus % self.gpus_per_node:
            raise ValueError(f"{self.gpus} GPUs are no whole nodes of {self.gpus_per_node}")

    @property
    def nodes(self) -> int:
        """Machines with GPUs; the driver's own is not among them."""
        return self.gpus // self.gpus_per_node


RESOURCES = {
    "GPUs": ("gpus", "gpus_per_node"),
    "cores": ("cores",),
    "network": ("network",),
    "S3 GET": ("source_prefixes",),
    "S3 PUT": ("run_prefixes",),
    "driver": ("driver_seconds",),
    "requests in flight": ("requests",),
    "fragments in flight": ("fragments_in_flight",),
}
"""What may be in the way, and the fields that say how much of it there is."""


def doubled(cluster: Cluster, resource: str) -> Cluster:
    """The same with twice of one resource; GPUs on as many nodes, a driver of half the time."""
    factor = 0.5 if resource == "driver" else 2
    return dataclasses.replace(
        cluster, **{name: getattr(cluster, name) * factor for name in RESOURCES[resource]}
    )
