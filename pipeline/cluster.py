"""`run_fragment` (run.py) on many machines, spread with Ray Data. Ray lives here and in jobs/.

A row of the data set is a fragment: one row in, one row out, whatever happens. An actor takes it
from bucket to mask as a process does, fetching one fragment while it segments another, so that
nothing travels but which fragment it is, and its receipt. Beside a GPU, whose process has better to
do than speak with a store, `load` is a leg of its own: tasks on any node, from which encoded bytes
travel to the actors. Pixels travel nowhere.

Ray runs even finished calls again after losing a node, so each first looks whether the fragment is
committed, and passes it through if so; the create-only put does the rest. Once the driver is asked
to stop they pass through what is not begun (pipeline/stopping.py).

Actors never hold every CPU, or those of a lost node, and the tasks that rebuild lost rows, would
find no place (FAULTS §0.5).
"""

# Ray Data types a leg as a function of one batch, though `fn_args` gives it more.
# pyright: reportArgumentType=false

import contextlib
import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa

from pipeline import head
from pipeline.clock import Clock
from pipeline.config import Compute, SegmentConfig
from pipeline.errors import RunRefused, RunUnfinished, StorageError
from pipeline.ledger import RUN
from pipeline.line import Line
from pipeline.memory import refuse_too_little
from pipeline.place import GPU_THREADS, Capacity, Found
from pipeline.probing import probing
from pipeline.records import EncodedImage, Receipt, Task, Verdict
from pipeline.run import Turn, in_flight, load, run_fragment
from pipeline.storage import open_store

# Ray binds the machine's outside address unless this switch, meant for other systems, is off:
# then a cluster that we start stays on 127.0.0.1 (STYLE §8). It must be set before Ray is imported.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_BACKEND_LOG_LEVEL", "fatal"
)  # C++ lines that Ray Data provokes in every run; files keep theirs

import ray
import ray.data as rd
import ray.exceptions
from ray.data.exceptions import ExecutionTimeoutError, RayDataUserCodeException
from ray.util.actor_pool import ActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.stopping import Notes, Stopping

In = TypeVar("In")
Out = TypeVar("Out")

LOAD_CPUS = 0.25  # mostly waiting
SEGMENT_CPUS = 0.5  # one actor per core may start, and half of the CPUs stay for what is around it
MOST_WORKERS = 1024  # actors an autoscaling cluster may grow to
GROW_AT, SHRINK_AT = 0.6, 0.25
"""Of the calls that a pool, with those to come, may have at once. All that are there have all, so
two thirds more are asked for; Ray's own bounds are for queues of twice as many."""
TRIES = 4  # workers that one item of `OnRay.each` may cost: it may be what kills them
FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Where the store is; never who we are: workers find credentials in their own chain."""
WORKERS = {"MALLOC_ARENA_MAX": "1"}
"""What glibc must know when a worker starts: Ray's threads have made their arenas before our code
runs, and memory freed in one never serves another (`pipeline.heap.one_arena`)."""

KEEP_WORKERS = {"idle_worker_killing_time_threshold_ms": 600_000}
"""Ray ends task workers beyond its count of cores after an idle second, though fragments, and steps
of a training, are longer than that; each start anew costs two seconds of a core (2026-11-27)."""


class OnRay:
    """A Ray cluster as the place where fragments run."""

    def __init__(self, where: str, compute: Compute) -> None:
        if where.startswith("ray://"):
            raise RunRefused(
                "--on ray://…: the Ray client protocol cannot carry this; "
                "give host:port, or submit a job"
            )
        self._compute = compute
        self._where, self._local = where, where == "local"
        self._connected = False
        self._ending: threading.Event | None = None
        """Set where the head is no longer needed."""

    def connect(self) -> None:
        """Reach the cluster, or start one: as late as possible, so that a refusal costs nothing."""
        if self._connected:
            return
        where = self._where
        _quiet()
        # Ray refuses what the surrounding job has set already, were it the same.
        told = {name: value for name, value in WORKERS.items() if name not in os.environ}
        shipped: dict[str, Any] = {} if self._local else {"env_vars": told}
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "runtime_env": shipped,
        }
        try:
            if self._local:
                _guard()
            with _hushed(), _signals_kept():
                if self._local:
                    os.environ.update(told)  # Ray inherits it, and what it started early fits then
                    memory = self._compute.object_store_mb * 1024**2
                    cores = len(os.sched_getaffinity(0))
                    ray.init(
                        address="local",
                        num_cpus=max(2, cores),
                        object_store_memory=memory,
                        include_dashboard=False,
                        _node_ip_address="127.0.0.1",
                        _system_config=KEEP_WORKERS,
                        **common,
                    )
                elif where == "auto":
                    ray.init(address="auto", **common)
                else:
                    here = Path(__file__).parent.parent
                    shipped["py_modules"] = [str(here / "pipeline"), str(here / "models")]
                    ray.init(address=where, **common)
        except (RunRefused, MemoryError):
            raise
        except Exception as error:  # Ray's own, OSError, ValueError, and plain ones of its start
            what = "start a Ray cluster here" if self._local else "reach a Ray cluster there"
            hint = head.crowded() if self._local else head.hint(where)
            raise RunRefused(f"--on {where}: cannot {what}: {error}{hint}") from error
        self._connected = True
        self._ending = head.watched(ray.get_runtime_context().gcs_address)
        if self._compute.device == "cuda" and not (_gpus_there() or _autoscaling()):
            raise RunRefused(
                f"--on {where} --compute.device cuda: no node there has a GPU; "
                "add one, or drop --compute.device"
            )

    def close(self) -> None:
        """Leave the cluster; one that we started ends."""
        if self._ending is not None:
            self._ending.set()
        if self._connected:
            ray.shutdown()

    def found(
        self,
        bundle: tuple[bytes, bytes],
        images: int,
        config: SegmentConfig,
    ) -> Found:
        """See `pipeline.place.Place.found`: not in the driver, which may have no GPU."""
        if self._local:
            return self._found_here(bundle, images, config)
        self.connect()
        probe = ray.remote(_probe).options(num_cpus=SEGMENT_CPUS, num_gpus=self.gpus)
        asked = probe.remote(bundle, config.model_dump_json())
        return Found(**_waited(asked, self._compute.no_progress_s))

    def _found_here(self, bundle: tuple[bytes, bytes], images: int, config: SegmentConfig) -> Found:
        """By a process that makes itself ready beside Ray's own start."""
        refuse_too_little(len(bundle[1]), processes=1)
        with probing() as found:
            self.connect()
            fragments = -(-images // config.fragment.images)  # at least: other bounds make more
            workers = min(self._wanted(self.alive()), max(1, fragments))
            refuse_too_little(len(bundle[1]), workers)
            compute = config.compute
            if not self.gpus:  # as its workers will see it
                compute = compute.model_copy(update={"device": "cpu"})
            return found(bundle, config.model_copy(update={"compute": compute}))

    @property
    def capacity(self) -> Capacity:
        """See `pipeline.place.Place.capacity`; a cluster that nobody has needed has none."""
        alive = self.alive() if self._connected else []
        cores, gpus = (sum(node.get(kind, 0) for node in alive) for kind in ("CPU", "GPU"))
        return Capacity(int(cores), int(gpus) if alive and self.gpus else 0)

    @property
    def gpus(self) -> int:
        """GPUs that a worker has: one where there are any and they are wanted."""
        if self._compute.device == "cpu":
            return 0
        return 1 if self._compute.device == "cuda" or _gpus_there() else 0

    def run(self, tasks: Iterable[Task], run_uri: str, stop: threading.Event) -> Iterator[Receipt]:
        """See `pipeline.place.Place.run`."""
        self.connect()
        todo = list(tasks)
        if stop.is_set():
            return
        _same_folder_everywhere(run_uri, self._compute.no_progress_s)
        _tune(self._compute, budgets=self._grows or bool(self.gpus))
        with in_our_words(), Stopping(stop) as stopping:
            about = (run_uri, self._compute.model_dump_json(), forwarded(), stopping.call)
            with contextlib.closing(self._rows(todo, about)) as rows:
                for row in rows:
                    stopping.landed(row["fragment"])
                    if row["receipt"]:
                        yield _receipt(row["receipt"])
                    if stopping.done:
                        return

    def _rows(self, todo: list[Task], about: tuple[str, ...]) -> Generator[dict[str, Any]]:
        """What comes out, a fragment a row."""
        rows = [pa.Table.from_pylist([asdict(task)]) for task in todo]
        legs = rd.from_arrow(rows)
        one: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
        if self.gpus:
            legs = legs.map_batches(_load, fn_args=about, num_cpus=LOAD_CPUS, **one)
        legs = legs.map_batches(
            _Worker, fn_constructor_args=(*about, self._turns), **one, **self._actors(len(todo))
        )
        batches = legs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for batch in cast("Iterable[pa.Table]", batches):
            yield from batch.to_pylist()

    def each(self, make: Callable[[], Callable[[In], Out]], items: Sequence[In]) -> Iterator[Out]:
        """What is made of each item, in any order, by workers that are made there.

        An item whose worker is lost is done again, some times: by another, or by the same one made
        anew.
        """
        self.connect()
        gpus, alive = self.gpus, self.alive()
        count = self._wanted(alive)
        worker = ray.remote(_Maker).options(
            num_cpus=_share(alive, count),
            num_gpus=gpus and _gpu_share(alive, count),
            max_concurrency=self._turns,
            max_restarts=-1,
            max_task_retries=TRIES - 1,
        )
        made = ray.put(make)
        actors = [worker.remote(made, forwarded()) for _ in range(min(count, len(items)))]
        with in_our_words():
            pool = ActorPool(actors * self._turns)
            for item in items:
                pool.submit(lambda actor, one: actor.work.remote(one), item)
            while pool.has_next():
                yield cast("Out", pool.get_next_unordered(self._compute.no_progress_s))

    @staticmethod
    def alive() -> list[dict[str, float]]:
        """What each node that is there has."""
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def _wanted(self, alive: list[dict[str, float]]) -> int:
        """Workers: as many as asked for, else one per GPU, else one per core."""
        total = sum(node.get("GPU" if self.gpus else "CPU", 0) for node in alive)
        return self._compute.workers or max(1, int(total))

    @property
    def _grows(self) -> bool:
        """Whether nodes may come."""
        return not self._local and _autoscaling()

    @property
    def _turns(self) -> int:
        """Fragments that a worker segments at a time."""
        return GPU_THREADS if self.gpus else 1

    def _actors(self, fragments: int) -> dict[str, Any]:
        """Actor pool and resources of the workers."""
        gpus, alive = self.gpus, self.alive()
        wanted = self._wanted(alive)
        if not self._grows:
            size = max(1, min(wanted, fragments))
            pool = {"size": size}
        else:
            pool = {
                "min_size": 1,
                "max_size": max(1, min(self._compute.workers or MOST_WORKERS, fragments)),
            }
        calls = in_flight(self._turns)
        strategy = rd.ActorPoolStrategy(
            **pool,
            max_tasks_in_flight_per_actor=calls,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=True,
        )
        # As many as there is room for come where nodes may: a core each, not two on one.
        cpus = 1 if self._grows and not gpus else _share(alive, wanted)
        return {
            "compute": strategy,
            "num_cpus": cpus,
            **({"num_gpus": _gpu_share(alive, wanted)} if gpus else {}),
        }


def _share(nodes: list[dict[str, float]], actors: int) -> float:
    """CPUs an actor holds: few enough that after losing the largest node one CPU stays free."""
    cpus = sorted(node.get("CPU", 0.0) for node in nodes if node.get("CPU", 0.0))
    if len(cpus) < 2:
        return SEGMENT_CPUS
    return round(max(0.05, min(SEGMENT_CPUS, (sum(cpus[:-1]) - 1) / actors)), 3)


def _gpu_share(nodes: list[dict[str, float]], actors: int) -> float:
    """GPUs an actor holds: one, or a part of one where there are more actors than GPUs."""
    gpus = int(sum(node.get("GPU", 0.0) for node in nodes))
    return 1 if actors <= gpus or not gpus else 1 / -(-actors // gpus)


def _guard() -> None:
    """See that a cluster of ours asks for a token, and that no other user can read it.

    Raises:
        RunRefused: if the environment wants no token.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        raise RunRefused(
            "--on local: with RAY_AUTH_MODE=disabled everyone on this machine could run code as "
            "you; unset it"
        )
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    # Where Ray looks for it, and would write it as the umask says.
    token = Path("~/.ray/auth_token").expanduser()
    token.parent.mkdir(mode=0o700, exist_ok=True)
    if token.exists():
        token.chmod(0o600)
        return
    whole = token.with_name(f".{secrets.token_hex(8)}")
    handle = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):  # another start was first
        os.link(whole, token)
    whole.unlink()


def _gpus_there() -> float:
    return ray.cluster_resources().get("GPU", 0)


def _autoscaling() -> bool:
    """Whether nodes may come: the launcher's head node knows its autoscaling config."""
    return Path("~/ray_bootstrap_config.yaml").expanduser().exists()


def _tune(compute: Compute, *, budgets: bool) -> None:
    context = rd.DataContext.get_current()
    # They share the cluster between legs, and bound a pool that grows: of no use to one leg alone,
    # and a fifth of what the driver computes.
    context.op_resource_reservation_enabled = budgets
    context.autoscaling_config.actor_pool_util_upscaling_threshold = GROW_AT
    context.autoscaling_config.actor_pool_util_downscaling_threshold = SHRINK_AT
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = compute.no_progress_s
    context.print_on_execution_start = False


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on stderr: Ray's C++ side announces its log level there. What fails still raises."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """SIGTERM means what it meant: Ray's start makes it an exit on the spot, with code 15."""
    heard = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(heard) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, heard)


def _quiet() -> None:
    """Ray's own lines are for Ray's log files; ours are for people."""
    for name in ("ray", "ray.data", "ray.serve", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _waited(reference: Any, patience_s: float) -> Any:  # noqa: ANN401 - whatever the task returned
    try:
        return ray.get(reference, timeout=patience_s)
    except ray.exceptions.RayError as error:
        raise _translated(error) from error


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Ray's errors as ours."""
    try:
        yield
    except (
        ray.exceptions.RayError,
        RayDataUserCodeException,
        ExecutionTimeoutError,
        TimeoutError,
    ) as error:
        raise _translated(error) from error


def forwarded() -> str:
    """What workers must know of this environment, as JSON."""
    return json.dumps({name: os.environ[name] for name in FORWARDED if name in os.environ})


def with_settings(settings: str) -> None:
    """Let this process find the store that the driver found."""
    os.environ.update(json.loads(settings))


def _translated(error: BaseException) -> Exception:
    """A leg's own error where there is one in the chain, else: not finished."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        for candidate in (seen, cause):
            if isinstance(candidate, StorageError | RunRefused | RunUnfinished):
                return type(candidate)(str(candidate.args[0]))
            if isinstance(candidate, MemoryError):  # numpy's wants other arguments
                return MemoryError(str(candidate))
        seen = cause if isinstance(cause, BaseException) and cause is not seen else seen.__cause__
    if isinstance(error, ray.exceptions.RayTaskError) or "UserCode" in type(error).__name__:
        return RuntimeError(f"a leg failed: {error}")
    first = str(error).partition("\n")[0]
    return RunUnfinished(
        f"the cluster gave up ({type(error).__name__}: {first}); run the same command again"
    )


# ------------------------------------------------------------------------------- on the workers


def _probe(bundle: tuple[bytes, bytes], config: str) -> dict[str, Any]:
    from pipeline.infer import Segmenter  # torch: on the worker only

    refuse_too_little(len(bundle[1]), processes=1)
    made = Segmenter.of(bundle, SegmentConfig.model_validate_json(config))
    return asdict(made.found())


@lru_cache(maxsize=2)
def _line(run_uri: str, compute: str, settings: str) -> Line:
    """The run's line in this worker process: built here, so that no credentials travel."""
    with_settings(settings)
    return Line.open(run_uri, Compute.model_validate_json(compute))


_TASK = tuple(Task.__dataclass_fields__)  # the columns of one


def _task(table: pa.Table) -> Task:
    return Task(**table.select(_TASK).to_pylist()[0])  # no copy of the pictures beside them


def _load(table: pa.Table, run_uri: str, compute: str, settings: str, call: str) -> pa.Table:
    """The load leg: encoded bytes of a fragment, or why there are none."""
    line, task = _line(run_uri, compute, settings), _task(table)
    clock = Clock()
    with clock.during("load"):
        done = line.ledger.is_committed(task.fragment)
        items = [] if done or Notes(call).stopped else list(load(line.images(task), line))
    verdicts = [None if item.verdict is None else asdict(item.verdict) for item in items]
    data = pa.array([item.data for item in items], pa.large_binary())
    row = {
        "data": pa.LargeListArray.from_arrays(pa.array([0, len(data)], pa.int64()), data),
        "verdicts": pa.array([json.dumps(verdicts)]),
        "clock": pa.array([json.dumps(clock.said())]),
    }
    return pa.table({**{name: table[name] for name in _TASK}, **row})


class _Worker:
    """An actor that holds the model, and some fragments at a time (run.py)."""

    def __init__(self, run_uri: str, compute: str, settings: str, call: str, turns: int) -> None:
        self._notes = Notes(call)
        self._line = _line(run_uri, compute, settings)
        self._segmenter = self._line.segmenter()
        self._turn = Turn(turns, lambda: self._notes.stopped)

    def __call__(self, table: pa.Table) -> pa.Table:
        task, clock, receipt = _task(table), Clock(), None
        if self._notes.begin(task.fragment):
            encoded = _fetched(table, self._line, task, clock)
            receipt = run_fragment(task, self._line, self._segmenter, clock, self._turn, encoded)
        said = "" if receipt is None else json.dumps(asdict(receipt))
        return pa.table({"fragment": table["fragment"], "receipt": [said]})


def _fetched(
    table: pa.Table, line: Line, task: Task, clock: Clock
) -> Iterator[EncodedImage] | None:
    """What `_load` has fetched, if it has: the fragment may have been committed then."""
    if "data" not in table.column_names:
        return None
    clock.hear(json.loads(table["clock"][0].as_py()))
    verdicts = json.loads(table["verdicts"][0].as_py())
    values = table["data"].combine_chunks().flatten()
    images = line.images(task)
    if len(images) != len(values):
        return None
    return (  # a copy each, once it is wanted
        EncodedImage(image, value.as_py(), None if verdict is None else Verdict(**verdict))
        for image, value, verdict in zip(images, values, verdicts, strict=True)
    )


class _Maker:
    """An actor that makes something of items (`OnRay.each`)."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], settings: str) -> None:
        with_settings(settings)
        self._work = make()

    def work(self, item: Any) -> Any:  # noqa: ANN401 - whatever it is
        """What becomes of it."""
        return self._work(item)


def _receipt(text: str) -> Receipt:
    return Receipt(**json.loads(text))


def _sees(run_uri: str) -> str:
    """Which run this node finds at a path: its token, or what went wrong."""
    try:
        return json.loads(open_store(run_uri).read(RUN))["token"]
    except (StorageError, RunRefused, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _same_folder_everywhere(run_uri: str, patience_s: float) -> None:
    """A local path must be the same folder on every node, or masks would lie in several places.

    Raises:
        RunRefused: naming a node that does not see it.
    """
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    if run_uri.startswith("s3://") or len(nodes) < 2:
        return
    here, ask = _sees(run_uri), ray.remote(_sees).options
    on = (NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes)
    asked = [ask(num_cpus=LOAD_CPUS, scheduling_strategy=node).remote(run_uri) for node in on]
    for node, there in zip(nodes, _waited(asked, patience_s), strict=True):  # all at once
        if there != here:
            raise RunRefused(
                f"node {node['NodeManagerAddress']} does not see this run at {run_uri} ({there}); "
                "use a shared folder or s3://"
            )
