"""A training's history for those who watch all of theirs in one place: TensorBoard, MLflow.

Both are optional packages and off by default; nothing else needs them. They hold copies, which are
never worth a training: what cannot be reached is refused at its start and only told at its end.
"""

import importlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import RunRefused
from pipeline.history import Row
from pipeline.passwords import without_password

log = logging.getLogger("maskfleet")

AT_ONCE = 1000  # metrics that one request to MLflow may bring


def expect(tensorboard: str | None, mlflow: str | None, name: str) -> None:
    """Look whether they are there, before hours are spent.

    Raises:
        RunRefused: a package is not installed, or the server does not answer as it should.
    """
    if tensorboard is not None:
        needed("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    if mlflow is not None:
        package = needed("mlflow", "mlflow", "--mlflow")
        try:
            _experiment(package.MlflowClient(mlflow), name)
        except Exception as error:  # noqa: BLE001 - whatever a foreign package raises
            raise RunRefused(f"--mlflow {_short(mlflow)}: {_short(str(error))}") from None


def tell(
    tensorboard: str | None,
    mlflow: str | None,
    name: str,
    training: str,
    rows: Sequence[Row],
    metrics: Mapping[str, Any],
) -> None:
    """Hand both of them the history, where they are asked for; what fails is logged.

    Args:
        tensorboard: the folder above all trainings.
        mlflow: the server's URI.
        name: of the model.
        training: its id.
        rows: every step.
        metrics: what came of it.
    """
    try:
        if tensorboard is not None:
            to_tensorboard(f"{tensorboard}/{training}", rows)
        if mlflow is not None:
            to_mlflow(mlflow, name, training, rows, metrics)
    except Exception as error:  # noqa: BLE001 - whatever foreign packages raise
        log.warning("the history is not copied to where it was to be: %s", _short(str(error)))


def to_tensorboard(folder: str, rows: Sequence[Row]) -> None:
    """Event files with one scalar per figure and step."""
    module = needed("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    writer = module.SummaryWriter(folder)
    for row in rows:
        for name, value in _scalars(row):
            writer.add_scalar(name, value, row.step)
    writer.close()


def to_mlflow(
    uri: str, name: str, training: str, rows: Sequence[Row], metrics: Mapping[str, Any]
) -> None:
    """A run of the experiment NAME with the same figures and the final ones."""
    package = needed("mlflow", "mlflow", "--mlflow")
    client = package.MlflowClient(uri)
    run = client.create_run(_experiment(client, name), run_name=training).info.run_id
    figures = [(key, value, row.step) for row in rows for key, value in _scalars(row)]
    end = rows[-1].step if rows else 0
    figures += [(f"final_{k}", v, end) for k, v in metrics.items() if isinstance(v, int | float)]
    when = int(1000 * time.time())
    told = [package.entities.Metric(key, value, when, step) for key, value, step in figures]
    for first in range(0, len(told), AT_ONCE):
        client.log_batch(run, told[first : first + AT_ONCE])
    client.set_terminated(run)


def _experiment(client: Any, name: str) -> str:  # noqa: ANN401 - MLflow's
    found = client.get_experiment_by_name(name)
    return client.create_experiment(name) if found is None else found.experiment_id


def _short(said: str) -> str:
    """The first line, without passwords of URLs."""
    return without_password(said.partition("\n")[0])


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
