"""Every step of a training: once each, whatever was done twice, as rows and as curves."""

import io
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import history, trackers
from pipeline.errors import RunRefused
from pipeline.history import Row
from pipeline.storage import LocalStore
from pipeline.trackers import needed


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "t")


def rows(first: int, last: int, loss: float = 1.0, looks: int = 0) -> list[Row]:
    """Steps; every so many one was looked at."""
    return [
        Row(n, loss / n, 1e-3, 2.0, 0.5 * n, 0.1 * n if looks and n % looks == 0 else None)
        for n in range(first, last + 1)
    ]


def later(store, name: str) -> None:
    """Let an object be written a while after the others."""
    path = store.root / "history" / name
    when = path.stat().st_mtime + 60
    os.utime(path, (when, when))


def test_rows_come_back_in_order_however_they_were_kept(store):
    history.keep(store, rows(5, 8, looks=4))
    history.keep(store, rows(1, 4))
    history.keep(store, [])

    assert history.kept(store) == [*rows(1, 4), *rows(5, 8, looks=4)]
    assert history.kept(store, until=6) == rows(1, 6)
    assert history.kept(LocalStore(store.root / "nowhere")) == []


def test_a_stretch_that_is_done_again_counts_once_and_the_later_one(store):
    history.keep(store, rows(1, 8, looks=4))
    history.keep(store, rows(5, 8, loss=9))
    later(store, "000000005-000000008.json")

    assert history.kept(store) == [*rows(1, 4, looks=4), *rows(5, 8, loss=9)]


def test_a_stretch_that_is_done_again_in_shorter_pieces_counts_too(store):
    history.keep(store, rows(5, 8, loss=9))
    history.keep(store, rows(5, 6))
    later(store, "000000005-000000006.json")

    assert history.kept(store) == [*rows(5, 6), *rows(7, 8, loss=9)]


def test_what_else_lies_there_is_no_history(store):
    history.keep(store, rows(1, 2))
    store.replace("history/notes.txt", b"no JSON")

    assert history.kept(store) == rows(1, 2)


def test_the_table_has_one_row_a_step_and_a_frozen_schema():
    table = history.table_of(rows(1, 4, looks=4))

    assert table.schema == pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("loss", pa.float64(), nullable=False),
            pa.field("learning_rate", pa.float64(), nullable=False),
            pa.field("gradient_norm", pa.float64(), nullable=False),
            pa.field("seconds", pa.float64(), nullable=False),
            pa.field("miou", pa.float64()),
        ]
    )
    assert table["step"].to_pylist() == [1, 2, 3, 4]
    assert table["miou"].to_pylist() == [None, None, None, 0.4]
    assert history.table_of([]).num_rows == 0


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([], id="none"),
        pytest.param(rows(1, 1), id="one"),
        pytest.param(rows(1, 1, looks=1), id="one with a score"),
        pytest.param(rows(1, 300), id="no scores"),
        pytest.param(rows(1, 300, looks=50), id="scores"),
        pytest.param([replace(row, loss=nan) for row in rows(1, 9)], id="NaN"),
        pytest.param([*rows(1, 9), Row(10, inf, 0.0, -inf, 5.0, nan)], id="a bad end"),
        pytest.param([replace(row, loss=0.0, miou=0.0) for row in rows(1, 9)], id="nothing but 0"),
        pytest.param([replace(row, loss=-1.0 / row.step) for row in rows(1, 9)], id="below 0"),
        pytest.param([replace(row, gradient_norm=1e300) for row in rows(1, 9)], id="huge"),
    ],
)
def test_curves_are_a_picture_that_opens(steps):
    with Image.open(io.BytesIO(history.curves(steps, "blobs, training 123"))) as image:
        image.load()

    assert image.format == "PNG"
    assert image.size == (2 * history.SIZE[0], 2 * history.SIZE[1] + 24)


def test_a_curve_is_drawn_where_there_is_something_to_draw():
    def blue(steps) -> list[int]:
        """Pixels of the bold line in each of the four charts."""
        with Image.open(io.BytesIO(history.curves(steps, "x"))) as image:
            line_HW = (np.asarray(image)[24:] == history.LINE).all(2)
        wide, high = history.SIZE
        charts = [line_HW[y : y + high, x : x + wide] for y in (0, high) for x in (0, wide)]
        return [int(chart_HW.sum()) for chart_HW in charts]

    loss, miou, rate, norm = blue(rows(1, 200, looks=20))
    assert min(loss, miou, rate, norm) > 200
    assert blue(rows(1, 200))[1] == 0
    assert blue([]) == [0] * 4


# for those who look elsewhere


class Writer:
    """What TensorBoard's writer takes."""

    def __init__(self, folder):
        self.folder, self.scalars, self.closed = folder, [], False
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_figure_of_every_step(monkeypatch, tmp_path):
    fake = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)

    trackers.tell(str(tmp_path), None, "blobs", "t", rows(1, 2, looks=2), {})

    assert Writer.last.folder == f"{tmp_path}/t"
    assert Writer.last.closed
    assert Writer.last.scalars == [
        ("loss", 1.0, 1), ("learning_rate", 1e-3, 1), ("gradient_norm", 2.0, 1),
        ("loss", 0.5, 2), ("learning_rate", 1e-3, 2), ("gradient_norm", 2.0, 2), ("miou", 0.2, 2),
    ]  # fmt: skip


class Tracking:
    """What MLflow takes."""

    def __init__(self, *, away: bool = False):
        self.said = []
        self.away = away
        self.experiments = {}
        self.entities = SimpleNamespace(Metric=lambda *figure: figure)

    def MlflowClient(self, uri):  # noqa: N802 - MLflow's name
        self.said.append(uri)
        return self

    def get_experiment_by_name(self, name):
        if self.away:
            raise OSError("http://me:secret@there does not answer\nat all")
        number = self.experiments.get(name)
        return number and SimpleNamespace(experiment_id=number)

    def create_experiment(self, name):
        return self.experiments.setdefault(name, str(len(self.experiments) + 1))

    def create_run(self, experiment, run_name):
        self.said.append((experiment, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="run"))

    def log_batch(self, run, metrics):
        assert run == "run"
        assert 0 < len(metrics) <= 1000
        self.said.append([(key, value, step) for key, value, _, step in metrics])

    def set_terminated(self, run):
        self.said.append("over")


@pytest.fixture
def tracking(monkeypatch):
    fake = Tracking()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def test_mlflow_gets_them_too_and_the_final_ones(tracking):
    metrics = {"miou": 0.5, "iou": {"a": 1.0}, "none": None}

    trackers.tell(None, "http://there", "blobs", "t1", rows(1, 1), metrics)
    trackers.tell(None, "http://there", "blobs", "t2", [], {})

    assert tracking.said == [
        "http://there", ("1", "t1"),
        [("loss", 1.0, 1), ("learning_rate", 1e-3, 1), ("gradient_norm", 2.0, 1),
         ("final_miou", 0.5, 1)],
        "over", "http://there", ("1", "t2"), "over",
    ]  # fmt: skip


def test_mlflow_gets_a_long_history_in_few_requests(tracking):
    trackers.to_mlflow("http://there", "blobs", "t", rows(1, 1500), {})

    assert [len(said) for said in tracking.said[2:-1]] == [1000] * 4 + [500]


def test_where_mlflow_is_away_a_training_is_refused_and_an_end_only_told(tracking, caplog):
    tracking.away = True

    with pytest.raises(RunRefused) as refused:
        trackers.expect(None, "http://me:secret@there", "blobs")
    trackers.tell(None, "http://me:secret@there", "blobs", "t", rows(1, 1), {})

    said = "http://***@there does not answer"
    assert str(refused.value) == f"--mlflow http://***@there: {said}"
    assert [record.getMessage() for record in caplog.records] == [
        f"the history is not copied to where it was to be: {said}"
    ]


def test_a_package_that_is_not_there_is_named_with_the_flag(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)

    with pytest.raises(RunRefused, match="--mlflow needs the mlflow package: pip install mlflow"):
        needed("mlflow", "mlflow", "--mlflow")
