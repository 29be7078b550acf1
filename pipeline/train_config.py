"""What can be asked of a training, and of the rounds of retraining that hold one."""

from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import Compute


class Training(BaseModel):
    """Data, recipe and place of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Labelled pictures: a folder or s3:// prefix, or `run://RUN?masks=FOLDER` (docs/labels.md)."""
    out: Annotated[str, tyro.conf.arg(metavar="REGISTRY")]
    """Where the version is published: a folder or s3:// prefix; made if it is empty."""
    name: str = "model"
    """Of the model in the registry: NAME/v0001, NAME/v0002, ..."""
    recipe: str = "default"
    """`default`, `street`, `pets`, `synthetic`, or a .json or .yaml file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Changes the recipe or the model: length=300, rate.peak=1e-3, model.size=xs. Repeatable."""
    split: str | None = None
    """Which split to learn from; default: `train`, or everything where there are no splits."""
    held_out: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Pictures to decide on: a split, or globs of keys that are then not learnt from. Default:
    `val`, or a tenth of the pictures by hash."""
    ontology: str | None = None
    """A JSON file with classes; default: what lies beside the data."""
    splits: str | None = None
    """A JSON file with lists of keys by split; default: what lies beside the data."""
    strata: str | None = None
    """A JSON file of key patterns and stratum names; default: what lies beside the data."""
    architecture: str | None = None
    """As of `segment`: the module outside that the model may name."""
    on: str = "process"
    """`process` (this one), `local` (Ray on this machine) or the address of a Ray cluster."""
    workers: int = Field(default=1, ge=1)
    """That share every step, on Ray; each has a GPU where there are any."""
    least_workers: int | None = Field(default=None, ge=1)
    """Go on with so few where nodes are lost, and with more when they come back; default: all."""
    every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints, and two looks at the pictures held out; default: 1/20."""
    threads: int | None = Field(default=None, ge=1)
    """Of torch in each worker on CPUs; default: all cores, shared by the workers of a machine."""
    tensorboard: str | None = None
    """A folder for TensorBoard's event files, one below it for each training (needs the tensorboard
    package)."""
    mlflow: str | None = None
    """The URI of an MLflow tracking server (needs the mlflow package)."""
    log: Literal["text", "json"] = "text"
    """How progress lines are written."""
    interval_s: float = Field(default=10.0, gt=0)
    """Seconds between progress lines."""
    compute: Compute = Compute()


class TrainConfig(Training):
    """Train a model on labelled pictures and publish it in a registry."""

    model: str
    """An architecture, `latent_attention` or `latent_attention:plus s`, to train from nothing; or
    a bundle, champion@REGISTRY, ... to go on from."""
    run: str | None = None
    """Id of the training; default: follows from model, data and recipe."""
