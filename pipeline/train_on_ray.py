"""A training shared by the workers of a Ray cluster: Ray Train around `training.work`.

Ray Data makes the parts of the steps wherever there are CPUs: a row is a part, decoded, cut and
coloured (part_rows.py, trainset.py), and rows come in the order of the steps, as many to each
worker. Ray Train starts the workers, notices when one is lost, and starts them again, as many as
there is room for; then the data set is made anew from the furthest whole checkpoint. Which worker
gets which part does not matter: gradients are summed over all parts of a step.

Ray Train hears where checkpoints are and has none of its own: of each one its controller would make
a note on storage, and end the training where that is away for a moment; and it would remove what
`Checkpoints` has removed already, which it takes for a failure as well.
"""

# Ray Data types a leg as a function of one batch, though `fn_args` gives it more.
# pyright: reportArgumentType=false

import functools
import os
import tempfile
from collections.abc import Iterator
from typing import Any, cast

from pipeline.checkpoints import Checkpoints
from pipeline.cluster import OnRay, forwarded, in_our_words, with_settings
from pipeline.errors import RunRefused, RunUnfinished
from pipeline.part_rows import Steps, made, part_of
from pipeline.telling import Progress
from pipeline.training import Team, Work, steps_of, work
from pipeline.trainset import Part

# Worker groups of a few CPUs start in seconds; Ray would wait 30 s longer for what never comes.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

import pyarrow as pa
import ray
import ray.data as rd
import ray.train
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

PART_CPUS = 0.25  # decoding and augmenting; a worker's threads take what is left
LEAST_CPUS = 0.01
LOST = 100  # workers or nodes lost before it gives up; each costs the steps since a checkpoint
RESIZE_S = 60  # between two looks for room for more workers
TASKS = 1000  # that the rest of a training is cut into; Ray's books take milliseconds for each
LEAST_STEPS = 4  # of a task, which may get a process of its own: that takes two seconds to start


class TrainOnRay(OnRay):
    """A Ray cluster as the place of a training, and of the looks at what came of it."""

    def train(self, job: Work, most: int, least: int) -> str | None:
        """See `pipeline.train.Trainers.train`."""
        self.connect()
        gpus = self.gpus
        held = {"CPU": self._cpus(most)} | ({"GPU": 1} if gpus else {})
        self._refuse_no_room(held, least)
        options = rd.ExecutionOptions(preserve_order=True)
        with tempfile.TemporaryDirectory(prefix="maskfleet-") as notes, in_our_words():
            trainer = TorchTrainer(
                _work,
                train_loop_config={"job": job, "settings": forwarded(), "cuda": bool(gpus)},
                datasets={"parts": functools.partial(_parts, job, forwarded())},
                dataset_config=DataConfig(execution_options=options, enable_shard_locality=False),
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=most if most == least else (least, most),
                    use_gpu=bool(gpus),
                    resources_per_worker=held,
                    # GPUs side by side share their links; CPUs are each other's rivals.
                    placement_strategy="PACK" if gpus else "SPREAD",
                    elastic_resize_monitor_interval_s=RESIZE_S,
                ),
                run_config=RunConfig(
                    name=job.call,
                    storage_path=notes,  # a mark that it can be written to, and nothing else
                    failure_config=FailureConfig(max_failures=LOST),
                ),
            )
            try:
                result = trainer.fit()
            except TrainingFailedError as error:
                raise RunUnfinished(f"{error}; run the same command again") from error
        return result.return_value

    def _cpus(self, workers: int) -> float:
        """CPUs a worker holds: all of them on one node leave half of it to make their parts.

        Or, once other nodes are lost, nothing could be made and nobody would notice.
        """
        nodes = [node["CPU"] for node in self.alive() if node.get("CPU", 0.0) > 0]
        return round(max(LEAST_CPUS, min(nodes, default=1.0) / 2 / workers), 3)

    def _refuse_no_room(self, held: dict[str, float], least: int) -> None:
        room = sum(
            int(min(node.get(name, 0.0) / wanted for name, wanted in held.items()))
            for node in self.alive()
        )
        if room < least:
            raise RunRefused(
                f"the cluster has room for {room} workers of {held}, {least} are needed; "
                "lower --workers, or add nodes"
            )


# ------------------------------------------------------------------------------------ the parts


def _parts(job: Work, settings: str) -> rd.Dataset:
    """All parts of the steps that are left; called anew whenever workers start."""
    with_settings(settings)
    state = Checkpoints(job.uri, job.call).newest()
    begin = 0 if state is None else state.done
    steps = max(1, steps_of(job.train.recipe, len(job.train.items)) - begin)
    each = max(LEAST_STEPS, steps // TASKS)
    stretches = [
        pa.table({"begin": [first], "end": [min(first + each, begin + steps)]})
        for first in range(begin, begin + steps, each)
    ]
    rows = rd.from_arrow(stretches)
    rows.context.target_max_block_size = 1  # a part is a block: so each worker gets its own
    return rows.map_batches(
        made,
        fn_args=(ray.put(Steps(job.train, job.parts)), settings),
        batch_size=1,
        batch_format="numpy",
        num_cpus=PART_CPUS,
    )


def _feed(begin: int) -> Iterator[Part]:  # noqa: ARG001 - `_parts` begins at the same checkpoint
    shard = cast("rd.DataIterator", ray.train.get_dataset_shard("parts"))
    batches = shard.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=2)
    return map(part_of, cast("Iterator[dict[str, Any]]", batches))


# ---------------------------------------------------------------------------------- the workers


def _work(config: dict[str, Any]) -> str | None:
    """What Ray Train runs in every worker; it hands on what the first one returns."""
    job, cuda = config["job"], config["cuda"]
    with_settings(config["settings"])
    return work(job, _team(cuda=cuda), _feed, _report)


def _team(*, cuda: bool) -> Team:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    context = ray.train.get_context()

    def total(value: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(value)
        return value

    def wrap(net: torch.nn.Module) -> torch.nn.Module:
        if context.get_world_size() == 1:
            return net
        return DistributedDataParallel(net, find_unused_parameters=True)

    size = context.get_world_size()
    return Team(
        rank=context.get_world_rank(),
        size=size,
        beside=context.get_local_world_size(),
        device=str(get_device()) if cuda else "cpu",
        wrap=wrap,
        **({"total": total} if size > 1 else {}),
    )


def _report(progress: Progress, folder: str | None) -> None:
    """Tell Ray Train, and whoever watches it, how far it is; all workers at once."""
    told = {"step": progress.step, "loss": progress.loss, "miou": progress.miou}
    ray.train.report({**told, "checkpoint": folder})
