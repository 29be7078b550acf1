"""Measuring a model: what is measured is what runs, counts add up, figures agree with others."""

import io
import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from pipeline.errors import RunRefused
from pipeline.evaluate import EvaluateConfig, as_json, evaluate
from pipeline.infer import Segmenter
from pipeline.labels import open_labelled
from pipeline.ontology import read_ontology
from pipeline.promotion import judge
from pipeline.reader import open_run
from pipeline.registry import Registry, tables_for
from pipeline.scoresheet import Shown, errors, sheet
from pipeline.scoretable import EVALUATION, Scores, description, of_kind
from pipeline.scoring import ROWS
from pipeline.storage import LocalStore
from pipeline.versions import Origin
from tests.archives import filled, segment
from tests.bundles import BUDGET, files_of
from tests.bundles import tiny_bundle as bundle_of
from tests.labelled import ONTOLOGY, SIZES, about, folder_pair, pairs, shard, truth
from tests.pictures import blobs, encoded

IDS = {"background": 0, "nucleus": 7}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four pictures, one of which takes four tiles, in two strata."""
    folder = folder_pair(tmp_path_factory.mktemp("labelled") / "data")
    (folder / "strata.json").write_text('{"sub/": "drawn", "": "photo"}')
    return folder


def asked(model, data, **how) -> EvaluateConfig:
    how = {"batch": {"pixels": BUDGET}, "compute": {"workers": 2}, "log": "text", **how}
    return EvaluateConfig.model_validate({"model": str(model), "data": str(data), **how})


@pytest.fixture(scope="module")
def measured(tiny_bundle, data):
    return evaluate(asked(tiny_bundle, data))


def rows_of(evaluation) -> dict[str, dict]:
    return {row["key"]: row for row in evaluation.table.to_pylist()}


def untimed(table):
    return table.drop_columns("seconds")


def truths() -> dict[str, np.ndarray]:
    """Masks by key, ids."""
    return {key: truth(blobs(*size, seed)) for seed, (key, size) in enumerate(SIZES.items())}


# what is measured is what runs


def test_the_counts_are_those_of_the_masks_that_a_run_makes(data, tiny_bundle, measured, tmp_path):
    segment(data / "images", tmp_path / "run", tiny_bundle, confidence=True)
    run = open_run(str(tmp_path / "run"))
    true, said, sure = [], [], []
    for key, mask_HW in truths().items():
        answer_HW = np.where(run.mask(key) == 1, 7, 0)
        kept_HW = mask_HW != 9
        row = rows_of(measured)[key]
        for place, value in enumerate(IDS.values()):
            is_HW, called_HW = (mask_HW == value) & kept_HW, (answer_HW == value) & kept_HW
            counts = [(is_HW & called_HW).sum(), is_HW.sum(), called_HW.sum()]
            names = ("intersection", "labelled", "answered")
            assert [row[name][place] for name in names] == counts
        assert row["pixels"] == mask_HW.size
        assert sum(row["bin_count"]) == kept_HW.sum()
        assert sum(row["bin_correct"]) == (mask_HW == answer_HW)[kept_HW].sum()
        true.append(mask_HW[kept_HW])
        said.append(answer_HW[kept_HW])
        sure.append(run.confidence(key)[kept_HW])
    true_N, said_N, sure_N = map(np.concatenate, (true, said, sure))

    figures = measured.figures
    ids = list(IDS.values())
    assert len(np.unique(said_N)) == 2
    expected = confusion_matrix(true_N, said_N, labels=ids)
    assert np.array(figures.confusion).tolist() == expected.tolist()
    assert figures.miou == pytest.approx(jaccard_score(true_N, said_N, labels=ids, average="macro"))
    assert figures.pixel_accuracy == pytest.approx((true_N == said_N).mean())
    assert figures.calibration_error == pytest.approx(ece(sure_N / 255, true_N == said_N))


def ece(sure_N, right_N, bins=15):
    """Expected calibration error in the words of its definition."""
    edges = np.arange(1, bins) * (255 // bins) / 255
    place_N = np.searchsorted(edges, sure_N, side="left")
    gaps = [
        (place_N == place).mean()
        * abs(sure_N[place_N == place].mean() - right_N[place_N == place].mean())
        for place in np.unique(place_N)
    ]
    return sum(gaps)


def test_answers_do_not_depend_on_workers_batches_or_the_company_of_other_pictures(
    data, tiny_bundle, measured
):
    alone = evaluate(
        asked(tiny_bundle, data, compute={"workers": 1}, batch={"pixels": 2**16}),
    )
    labelled = open_labelled(str(data))
    halves = [labelled.items[:2], labelled.items[2:]]
    parts = [evaluate(asked(tiny_bundle, data), labelled.among(half)) for half in halves]

    assert untimed(alone.table).to_pylist() == untimed(measured.table).to_pylist()
    rows = [row for part in parts for row in untimed(part.table).to_pylist()]
    assert sorted(rows, key=lambda row: row["key"]) == untimed(measured.table).to_pylist()
    together = sum(np.array(part.figures.confusion) for part in parts)
    assert together.tolist() == np.array(measured.figures.confusion).tolist()


def test_shards_give_the_rows_of_the_folder(tiny_bundle, measured, tmp_path):
    filled(tmp_path, {"t.tar": shard(pairs()), **about()})

    found = evaluate(asked(tiny_bundle, tmp_path))

    keyless = untimed(measured.table).drop_columns(["key", "stratum"])
    assert untimed(found.table).drop_columns(["key", "stratum"]).to_pylist() == keyless.to_pylist()


def test_classes_are_matched_by_name_whatever_their_ids_and_order(data, tmp_path, measured):
    turned = json.loads((data / "ontology.json").read_bytes())
    turned["classes"].reverse()
    (tmp_path / "o.json").write_text(json.dumps(turned))
    model = bundle_of(tmp_path / "model", ids=(200, 3))

    found = evaluate(asked(model, data, ontology=str(tmp_path / "o.json")))

    assert [one.name for one in found.figures.classes] == ["nucleus", "background"]
    assert [one.iou for one in found.figures.classes] == [
        one.iou for one in reversed(measured.figures.classes)
    ]
    assert found.figures.miou == pytest.approx(measured.figures.miou)


def test_where_a_picture_holds_no_data_nothing_is_counted(tiny_bundle, tmp_path):
    picture = np.dstack([blobs(40, 50, 5), np.full((40, 50), 255, np.uint8)])
    picture[:10, :, 3] = 0
    mask = encoded(np.full((40, 50), 7, np.uint8), "PNG")

    found = evaluate(
        asked(tiny_bundle, folder_pair(tmp_path, {"a.png": (encoded(picture, "PNG"), mask)}))
    )

    (row,) = found.table.to_pylist()
    assert sum(row["labelled"]) == sum(row["answered"]) == sum(row["bin_count"]) == 30 * 50
    assert row["pixels"] == 40 * 50


# the table and the gate


def test_the_table_is_the_one_that_the_gate_reads(measured):
    table = measured.table

    assert table.schema.remove_metadata() == ROWS
    assert of_kind(table, EVALUATION, "it").num_rows == 4
    assert Scores.of(table, "it").miou() == pytest.approx(measured.figures.miou)
    assert table["key"].to_pylist() == sorted(SIZES)
    decision = judge(table, table)
    assert decision.champion_miou == pytest.approx(measured.figures.miou)


def test_the_table_says_whose_it_is(measured, tiny_bundle, data):
    said = description(measured.table)

    assert said["evalset"] == measured.figures.about.evalset == open_labelled(str(data)).sha256
    assert said["bundle"] == measured.figures.about.bundle
    assert said["classes"] == ["background", "nucleus"]


def test_every_row_has_its_share_of_the_models_time(measured):
    seconds = measured.table["seconds"].to_pylist()

    assert all(value > 0 for value in seconds)
    expected = sum(seconds) / measured.figures.megapixels
    assert measured.figures.model_seconds_per_megapixel == pytest.approx(expected)


def test_strata_have_figures_of_their_own(measured):
    counts = {"drawn": ["sub/b.png", "sub/c.png"], "photo": ["a.jpg", "d.jpg"]}
    for stratum, keys in counts.items():
        rows = [rows_of(measured)[key] for key in keys]
        shared, labelled, answered = (
            np.sum([row[name] for row in rows], axis=0)
            for name in ("intersection", "labelled", "answered")
        )
        found = measured.figures.strata[stratum]
        assert found.images == 2
        assert found.miou == pytest.approx((shared / (labelled + answered - shared)).mean())


def test_a_perfect_model_is_perfect_in_everything(data, tiny_bundle, tmp_path):
    segment(data / "images", tmp_path / "run", tiny_bundle)
    run = open_run(str(tmp_path / "run"))
    own = {
        key: (image, encoded(np.where(run.mask(key) == 1, 7, 0).astype(np.uint8), "PNG"))
        for key, (image, _) in pairs().items()
    }

    figures = evaluate(asked(tiny_bundle, folder_pair(tmp_path / "own", own))).figures

    assert (figures.miou, figures.mean_dice, figures.boundary_f) == (1, 1, 1)
    assert (figures.pixel_accuracy, figures.mean_accuracy) == (1, 1)
    assert figures.confusion[0][1] == figures.confusion[1][0] == 0


# what is refused and what is rejected


def test_a_bad_picture_is_a_row_among_the_rejected(tiny_bundle, tmp_path):
    both = pairs()
    image, mask = both["a.jpg"]

    found = evaluate(
        asked(tiny_bundle, folder_pair(tmp_path, {**both, "a.jpg": (image[:300], mask)}))
    )

    assert found.figures.images == 3
    (row,) = found.rejected.to_pylist()
    assert (row["key"], row["station"], row["reason"]) == ("a.jpg", "decode", "truncated")


def test_a_set_of_bad_pictures_has_no_figures(tiny_bundle, tmp_path):
    image, mask = pairs()["a.jpg"]

    found = evaluate(asked(tiny_bundle, folder_pair(tmp_path, {"a.jpg": (image[:300], mask)})))

    assert (found.figures.images, found.figures.rejected) == (0, 1)
    assert found.figures.miou is None
    assert json.loads(as_json(found.figures))["boundary_f"] is None


class Elsewhere:
    """Workers one after the other, with the scorers that ``change`` makes of theirs."""

    def __init__(self, change=lambda scorer: scorer):
        self.change = change

    def found(self, bundle, images, config):
        return Segmenter.of(bundle, config).found(BUDGET)

    def each(self, make, items):
        make = pickle.loads(pickle.dumps(make))
        for item in reversed(items):
            yield pickle.loads(pickle.dumps(self.change(make())(item)))


def no_memory_for_high_tiles(scorer):
    run = scorer._segmenter._run

    def limited(tiles, height, width, confidence):
        if height > 96:
            raise MemoryError
        return run(tiles, height, width, confidence)

    scorer._segmenter._run = limited
    return scorer


def test_what_is_measured_elsewhere_is_the_same(data, tiny_bundle, measured):
    found = evaluate(asked(tiny_bundle, data), workers=Elsewhere())

    assert untimed(found.table).equals(untimed(measured.table))
    assert found.figures.confusion == measured.figures.confusion


def test_a_picture_that_does_not_fit_the_memory_is_rejected_and_the_others_are_not(
    data, tiny_bundle
):
    config = asked(tiny_bundle, data)
    found = evaluate(config, workers=Elsewhere(no_memory_for_high_tiles))

    (row,) = found.rejected.to_pylist()
    assert (row["key"], row["station"], row["reason"]) == ("sub/c.png", "predict", "too_large")
    assert found.figures.images == 3


def refusal(*what, **how) -> str:
    with pytest.raises(RunRefused) as refused:
        evaluate(asked(*what, **how))
    return str(refused.value)


def test_a_model_of_other_classes_is_refused_with_both_sides(data, tmp_path):
    model = bundle_of(tmp_path / "model", ids=(0, 1, 2))

    said = refusal(model, data)

    assert "different classes" in said
    assert "only the model" in said
    assert "knows debris" in said


def test_a_classifier_is_not_measured_by_masks(data, tiny_classifier):
    assert "is a classifier, and" in refusal(tiny_classifier, data)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"split": "val"}, "no split 'val'; it has: all (4)"),
        ({"picture_sheet": "x.jpg"}, "must end in .png"),
        ({"keep": True}, "is in no registry"),
        ({"tile": {"size": 16}}, "--tile.size 16 is below"),
        ({"ontology": "nowhere.json"}, "nowhere.json is not there"),
    ],
)
def test_what_cannot_be_done_is_refused(data, tiny_bundle, how, said):
    assert said in refusal(tiny_bundle, data, **how)


def test_wrong_masks_are_refused_before_a_model_is_loaded(tiny_bundle, tmp_path):
    image = pairs()["a.jpg"][0]
    mask = encoded(np.full(SIZES["a.jpg"], 3, np.uint8), "PNG")
    folder = folder_pair(tmp_path, {"a.jpg": (image, mask)})

    class Nowhere:
        def found(self, bundle, images, config):
            raise AssertionError

    with pytest.raises(RunRefused, match=r"a\.png holds 3"):
        evaluate(asked(tiny_bundle, folder), workers=Nowhere())


# splits


def test_the_test_split_is_measured_unless_another_is_named(tiny_bundle, tmp_path):
    folder = folder_pair(tmp_path)
    filled(folder, {"train.txt": b"a\nd", "test.txt": b"sub/b"})

    test, train = (evaluate(asked(tiny_bundle, folder, split=s)) for s in (None, "train"))

    assert test.table["key"].to_pylist() == ["sub/b.png"]
    assert test.figures.about.split == "test"
    assert train.table["key"].to_pylist() == ["a.jpg", "d.jpg"]
    assert train.figures.about.evalset != test.figures.about.evalset


# what is written


def test_a_folder_gets_the_table_the_rejected_and_all_figures(data, tiny_bundle, tmp_path):
    out = tmp_path / "out"

    found = evaluate(asked(tiny_bundle, data, out=str(out)))

    assert pq.read_table(out / "evaluation.parquet").equals(found.table)
    assert pq.read_table(out / "rejected.parquet").num_rows == 0
    assert json.loads((out / "figures.json").read_text())["miou"] == found.figures.miou


def test_a_parquet_file_gets_the_table(data, tiny_bundle, tmp_path):
    found = evaluate(asked(tiny_bundle, data, out=str(tmp_path / "x.parquet")))

    assert pq.read_table(tmp_path / "x.parquet").equals(found.table)


def test_a_version_keeps_its_evaluation_where_the_gate_looks(data, tiny_bundle, tmp_path):
    registry = Registry.found(LocalStore(tmp_path / "registry"))
    version = registry.publish("cells", files_of(tiny_bundle), Origin(training="t"))

    found = evaluate(asked(version.reference, data, keep=True))

    assert tables_for(version, found.figures.about.evalset).equals(found.table)
    assert found.figures.about.model == version.reference


def test_the_sheet_shows_worst_best_and_others_with_their_errors(data, tiny_bundle, tmp_path):
    path = tmp_path / "sheet.png"

    evaluate(asked(tiny_bundle, data, picture_sheet=str(path)))

    with Image.open(path) as image:
        wide, high = image.size
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    assert wide == 4 * 256 + 5 * 12
    assert high == 30 + 4 * (256 + 34 + 12) + 12
    assert (214, 39, 40) in colours


def test_errors_are_red_right_pixels_gray_and_ignored_ones_white():
    labels, answers = np.array([[0, 1, 255]], np.uint8), np.array([[0, 0, 0]], np.uint8)

    assert errors(labels, answers, 255).tolist() == [[[225] * 3, [214, 39, 40], [250] * 3]]


def test_a_sheet_holds_pictures_of_any_kind():
    ontology = read_ontology(json.dumps(ONTOLOGY).encode(), "x")
    deep = (np.arange(600).reshape(20, 30, 1) * 100).astype(np.uint16)
    labels = np.zeros((20, 30), np.uint8)

    made = sheet([Shown.of("a\nb", deep, labels, labels, ontology)], ontology)

    with Image.open(io.BytesIO(made)) as image:
        assert image.size[1] == 30 + 256 + 34 + 12 + 12
