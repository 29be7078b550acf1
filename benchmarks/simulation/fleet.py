"""Fragments on their way through a cluster: driver, load, segment, store, driver.

Left out, because nobody has measured it or it weighs little: the processor time of a GET, stored
bytes (6 kB a picture of camvid, RESULTS.md), planning, finalizing, throttling beyond an even rate.
"""

import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulation.description import Cluster, Work
from benchmarks.simulation.events import Events, Server

SAMPLES = 256  # fragments whose requests are simulated one by one; all others take as long as one


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went."""

    seconds: float
    pictures_per_second: float
    """From the first moment to the last receipt."""
    steady: float
    """Pictures a second without the first third of the receipts, while queues fill, and the last
    tenth, while they empty."""
    used: dict[str, float]
    """Of each resource, the share of its time that it worked."""
    losses: int
    begun_again: int
    """Pictures of fragments that were begun once more, after a loss."""
    adopted: int
    """Fragments begun once more that were found committed."""
    commits: bytes
    """How often each fragment's object was created."""

    @property
    def bottleneck(self) -> str:
        """The resource that worked most."""
        return max(self.used, key=lambda name: self.used[name])


class Gpu(Server):
    """One GPU and the actor that feeds it."""

    __slots__ = ("held",)

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.held = 0  # fragments in flight


class Node:
    """A machine with GPUs; its life is the number of those that had its place before."""

    def __init__(self, cluster: Cluster) -> None:
        self.gpus = [Gpu(cluster.gpu_rate) for _ in range(cluster.gpus_per_node)]
        self.cores, self.network = Server(cluster.cores), Server(cluster.network / 8)
        self.alive, self.life, self.loading = True, 0, 0
        self.loaded = deque[int]()
        self.in_flight = set[int]()  # sent to it by the driver, which has no receipt yet

    def lose(self, now: float) -> list[int]:
        """Forget everything; what was in flight."""
        for server in (*self.gpus, self.cores, self.network):
            server.stop(now)
        for gpu in self.gpus:
            gpu.held = 0
        lost = sorted(self.in_flight)
        self.alive, self.life, self.loading = False, self.life + 1, 0
        self.loaded.clear()
        self.in_flight.clear()
        return lost


class Fleet:
    """A simulation under way: a method per station, each announcing the next."""

    def __init__(self, work: Work, cluster: Cluster, seed: int) -> None:
        self.work, self.cluster = work, cluster
        self.random, self.events = random.Random(seed), Events()
        self.nodes = [Node(cluster) for _ in range(cluster.nodes)]
        self.driver = Server(1 / cluster.driver_seconds)
        self.get = Server(cluster.get_rate * cluster.source_prefixes)
        self.put = Server(cluster.put_rate * cluster.run_prefixes)
        self.load_seconds = [self._loading() for _ in range(SAMPLES)]
        self.waited = Counter[str]()  # seconds without the time in queues
        self.fresh, self.again = iter(range(work.fragments)), deque[int]()
        self.commits, self.receipts = bytearray(work.fragments), list[float]()
        self.losses = self.begun_again = self.adopted = 0

    def run(self) -> None:
        """Until the driver has every receipt."""
        for node in self.nodes:
            self._start(node)
        self.events.run(lambda: len(self.receipts) == self.work.fragments)

    # ------------------------------------------------------------------ the way of a fragment

    def _feed(self, node: Node) -> None:
        """The driver sends what the node has room for."""
        most, room = self.cluster.loads, self.cluster.loads + self.cluster.loaded
        while node.alive and node.loading < most and node.loading + len(node.loaded) < room:
            fragment = self.again.popleft() if self.again else next(self.fresh, None)
            if fragment is None:
                return
            node.loading += 1
            node.in_flight.add(fragment)
            # Half of its time a fragment costs the driver now, half when the receipt arrives.
            self._then(node, self.driver.served(self.events.now, 0.5), self._load, fragment)

    def _load(self, node: Node, fragment: int) -> None:
        if self.commits[fragment]:  # each leg asks first, and passes on what is there (DESIGN §2)
            node.loading -= 1
            self.adopted += 1
            self._commit(node, fragment)
            self._feed(node)
            return
        now, pictures = self.events.now, self.work.size(fragment)
        share = pictures / self.work.fragment_pictures
        seconds = self.random.choice(self.load_seconds) * share
        self.waited["requests in flight"] += seconds
        came = node.network.served(now, pictures * self.work.encoded_bytes)
        end = max(now + seconds, came, self.get.served(now, pictures / self.cluster.get_pictures))
        self._then(node, end, self._wait, fragment)

    def _wait(self, node: Node, fragment: int) -> None:
        node.loading -= 1
        node.loaded.append(fragment)
        self._begin(node)

    def _begin(self, node: Node) -> None:
        while node.loaded:
            gpu = min(node.gpus, key=lambda gpu: gpu.held)
            if gpu.held == self.cluster.fragments_in_flight:
                break
            gpu.held += 1
            seconds = self._latency()  # the note of the attempt
            end = self._put(seconds)
            self.waited["fragments in flight"] += seconds
            self._then(node, end, self._decode, gpu, node.loaded.popleft())
        self._feed(node)

    def _decode(self, node: Node, gpu: Gpu, fragment: int) -> None:
        seconds = self.work.size(fragment) * self.work.decode_seconds
        end = self._worked(node, seconds, self.cluster.decode_threads)
        self._then(node, end, self._predict, gpu, fragment)

    def _predict(self, node: Node, gpu: Gpu, fragment: int) -> None:
        pictures = self.work.size(fragment)
        self.waited["fragments in flight"] += pictures / gpu.rate
        self._then(node, gpu.served(self.events.now, pictures), self._encode, gpu, fragment)

    def _encode(self, node: Node, gpu: Gpu, fragment: int) -> None:
        seconds = self.work.size(fragment) * self.work.encode_seconds
        self._then(node, self._worked(node, seconds, 1), self._store, gpu, fragment)

    def _store(self, node: Node, gpu: Gpu, fragment: int) -> None:
        gpu.held -= 1
        self._then(node, self._put(self._latency()), self._create, fragment)
        self._begin(node)

    def _create(self, node: Node, fragment: int) -> None:
        self.commits[fragment] += 1
        self._commit(node, fragment)

    def _commit(self, node: Node, fragment: int) -> None:
        self._then(node, self.driver.served(self.events.now, 0.5), self._receive, fragment)

    def _receive(self, node: Node, fragment: int) -> None:
        node.in_flight.discard(fragment)
        self.receipts.append(self.events.now)

    # ------------------------------------------------------------------ how long things take

    def _worked(self, node: Node, seconds: float, threads: int) -> float:
        """When so many threads, on cores that others want too, have done the work."""
        alone = seconds / threads
        self.waited["fragments in flight"] += alone
        return max(self.events.now + alone, node.cores.served(self.events.now, seconds))

    def _put(self, seconds: float) -> float:
        return max(self.events.now + seconds, self.put.served(self.events.now, 1))

    def _latency(self) -> float:
        return self.random.lognormvariate(
            math.log(self.cluster.latency_seconds), self.cluster.latency_tail
        )

    def _loading(self) -> float:
        """Seconds until all requests of a fragment are answered, so many at a time."""
        threads = [0.0] * self.cluster.requests
        for _ in range(math.ceil(self.work.fragment_pictures / self.cluster.get_pictures)):
            heapq.heapreplace(threads, threads[0] + self._latency())
        return max(threads)

    # ------------------------------------------------------------------ nodes come and go

    def _start(self, node: Node) -> None:
        node.alive = True
        if self.cluster.losses:
            lasts = self.random.expovariate(self.cluster.losses / 3600)
            self.events.at(self.events.now + lasts, self._lose, node)
        self._feed(node)

    def _lose(self, node: Node) -> None:
        self.losses += 1
        lost, now = node.lose(self.events.now), self.events.now
        self.begun_again += sum(self.work.size(f) for f in lost if not self.commits[f])
        self.events.at(now + self.cluster.detection_seconds, self._notice, lost)
        self.events.at(now + self.cluster.replacement_seconds, self._start, node)

    def _notice(self, lost: list[int]) -> None:
        self.again.extend(lost)
        for node in self.nodes:
            self._feed(node)

    def _then(self, node: Node, time: float, do: Callable[..., None], *about: object) -> None:
        """Announce what happens on a node, if that lives so long."""
        self.events.at(time, self._if_alive, node, node.life, do, about)

    @staticmethod
    def _if_alive(
        node: Node, life: int, do: Callable[..., None], about: tuple[object, ...]
    ) -> None:
        if node.life == life:
            do(node, *about)


def simulated(work: Work, cluster: Cluster, seed: int = 0) -> Outcome:
    """What the cluster makes of the work; the same for the same seed."""
    fleet = Fleet(work, cluster, seed)
    fleet.run()
    seconds, receipts, nodes = fleet.events.now, fleet.receipts, fleet.nodes
    start, end = len(receipts) // 3, len(receipts) * 9 // 10
    first, last = receipts[start], receipts[end]
    between = (end - start) * work.fragment_pictures
    busy = {
        "GPUs": sum(gpu.busy for node in nodes for gpu in node.gpus) / cluster.gpus,
        "cores": sum(node.cores.busy for node in nodes) / cluster.nodes,
        "network": sum(node.network.busy for node in nodes) / cluster.nodes,
        "S3 GET": fleet.get.busy,
        "S3 PUT": fleet.put.busy,
        "driver": fleet.driver.busy,
        "requests in flight": fleet.waited["requests in flight"] / cluster.nodes / cluster.loads,
        "fragments in flight": fleet.waited["fragments in flight"]
        / (cluster.gpus * cluster.fragments_in_flight),
    }
    return Outcome(
        seconds=seconds,
        pictures_per_second=work.pictures / seconds,
        steady=between / (last - first) if last > first else work.pictures / seconds,
        used={name: spent / seconds for name, spent in busy.items()},
        losses=fleet.losses,
        begun_again=fleet.begun_again,
        adopted=fleet.adopted,
        commits=bytes(fleet.commits),
    )
