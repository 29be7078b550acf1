"""A training's history for those who watch all of theirs in one place: TensorBoard, MLflow.

Both are optional packages and off by default; nothing else needs them.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import RunRefused
from pipeline.history import Row


def to_tensorboard(folder: str, rows: Sequence[Row]) -> None:
    """Event files with one scalar per figure and step."""
    module = needed("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    writer = module.SummaryWriter(folder)
    for row in rows:
        for name, value in _scalars(row):
            writer.add_scalar(name, value, row.step)
    writer.close()


def to_mlflow(uri: str, name: str, rows: Sequence[Row], metrics: Mapping[str, Any]) -> None:
    """A run of the experiment NAME with the same figures and the final ones."""
    mlflow = needed("mlflow", "mlflow", "--mlflow")
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(name)
    with mlflow.start_run():
        for row in rows:
            mlflow.log_metrics(dict(_scalars(row)), step=row.step)
        final = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        mlflow.log_metrics({f"final_{k}": v for k, v in final.items()})


def needed(module: str, package: str, flag: str) -> Any:  # noqa: ANN401 - a module
    """An optional package.

    Raises:
        RunRefused: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunRefused(f"{flag} needs the {package} package: pip install {package}") from error


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    yield "loss", row.loss
    yield "learning_rate", row.learning_rate
    yield "gradient_norm", row.gradient_norm
    if row.miou is not None:
        yield "miou", row.miou
