"""An archive in, masks and statistics out, in one process: the oracle of every distributed test."""

import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

import models
from models.parts import kernels
from pipeline import open_run
from pipeline.config import from_mapping
from pipeline.decode import DecodeLimits, decode
from pipeline.errors import (
    EXIT_DONE,
    EXIT_REJECTIONS,
    REASONS,
    ImageRejected,
    RunRefused,
    RunUnfinished,
)
from pipeline.ledger import Ledger
from pipeline.listing import Listing, discover, key_of
from pipeline.storage import LocalStore
from tests import archives, hostile
from tests.archives import filled, jpeg, png, problems, segment, tree, uniform
from tests.bundles import InProcess, files_of, window_segmenter
from tests.pictures import with_orientation
from tests.runs import commits, content

KEYS = [
    "loose/a.jpg", "loose/b.png", "loose/broken.jpg", "loose/deep.png", "loose/gray.png",
    "loose/held.jpg", "loose/one.png", "loose/see-through.png", "shard-000.tar#x/1.jpg",
    "shard-000.tar#x/2.png", "table.parquet#0", "table.parquet#1", "table.parquet#2",
]  # fmt: skip


# -- the oracle ----------------------------------------------------------------------------------


def every_picture(source) -> dict[str, bytes]:
    """The encoded pictures of an archive by key, read with nothing of ours."""
    found = {f"loose/{p.name}": p.read_bytes() for p in (source / "loose").iterdir()}
    with tarfile.open(source / "shard-000.tar") as shard:
        for member in shard:
            if not member.name.endswith(".json"):
                found[f"shard-000.tar#{member.name}"] = shard.extractfile(member).read()
    column = pq.read_table(source / "table.parquet", use_threads=False)["image"].to_pylist()
    return found | {f"table.parquet#{row}": data for row, data in enumerate(column)}


@torch.inference_mode()
def by_hand(model, data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, confidence and whether two classes are too close to call: a plain loop's body."""
    pixels = decode(data, DecodeLimits())
    values = pixels.values_HWC.astype(np.float32) / np.iinfo(pixels.values_HWC.dtype).max
    x_HWC = (np.repeat(values, 3 // values.shape[2], axis=2) - 0.2) / 0.25
    pad = [(0, max(0, 4 - side)) for side in x_HWC.shape[:2]]
    x_HWC = np.pad(x_HWC, (*pad, (0, 0)))
    logits_KHW = model(torch.from_numpy(x_HWC).permute(2, 0, 1)[None])[0]
    logits_KHW = logits_KHW[:, : pixels.height, : pixels.width]
    sure, labels = logits_KHW.softmax(0).max(0)
    best = logits_KHW.topk(2, dim=0).values
    labels = labels.numpy().astype(np.uint8)
    if pixels.nodata_HW is not None:
        labels[pixels.nodata_HW] = 255
    return labels, sure.numpy(), (best[0] - best[1] < 1e-5).numpy()


def test_the_run_equals_a_plain_loop_over_the_model(finished):
    model, _ = models.load_bundle(finished.model)
    run = open_run(str(finished.out))
    stats = {(r["image_id"], r["class_id"]): r for r in run.class_stats.to_pylist()}
    seen, rejected = 0, {}
    for key, data in every_picture(finished.source).items():
        row = run.row(key)
        try:
            labels, sure, close = by_hand(model, data)
        except ImageRejected as verdict:
            rejected[key] = (verdict.station, verdict.reason)
            continue
        mask = run.mask(key)
        assert mask.shape == labels.shape
        assert np.all((mask == labels) | close)
        for class_id in range(2):
            inside = mask == class_id
            stat = stats.pop((row["image_id"], class_id), None)
            assert (stat is None) == (not inside.any())
            if stat:
                assert stat["pixel_count"] == inside.sum()
                assert stat["fraction"] == pytest.approx(inside.sum() / (mask != 255).sum())
                assert stat["mean_confidence"] == pytest.approx(sure[inside].mean(), abs=1e-5)
        assert row["mean_confidence"] == pytest.approx(sure[mask != 255].mean(), abs=1e-5)
        seen += 1
    assert seen == 12
    assert not stats
    assert rejected == {r["key"]: (r["station"], r["reason"]) for r in run.rejected.to_pylist()}


def test_masks_are_not_trivial(finished):
    run = open_run(str(finished.out))

    assert {tuple(np.unique(run.mask(k))) for k in ("loose/a.jpg", "loose/see-through.png")} == {
        (0, 1), (0, 1, 255),
    }  # fmt: skip


# -- what is written: a contract -----------------------------------------------------------------


def test_every_image_is_in_one_state_and_the_counts_say_so(finished):
    run, outcome = open_run(str(finished.out)), finished.outcome

    assert run.images["key"].to_pylist() == KEYS
    assert run.images["image_id"].to_pylist() == list(range(13))
    assert run.images["status"].to_pylist().count("done") == 12
    assert run.rejected.select(["key", "station", "reason"]).to_pylist() == [
        {"key": "loose/broken.jpg", "station": "decode", "reason": "truncated"}
    ]
    assert outcome.exit_code == EXIT_REJECTIONS
    counts = outcome.counts
    assert (counts.planned, counts.done, counts.rejected) == (13, 12, {"truncated": 1})
    assert outcome.receipt["skipped"] == {".json": 1, ".md": 1, "webdataset member": 1}
    assert outcome.receipt["this_call"]["images"] == 13
    assert problems(finished.out) == []


def test_the_receipt_says_how_near_to_the_limit_the_call_came_and_what_limited_it(finished):
    call = finished.outcome.receipt["this_call"]

    assert {"load", "decode", "predict", "measure", "pack", "store"} <= set(
        call["busy_seconds_per_stage"]
    )
    worked = sum(call["busy_seconds_per_stage"].values())
    limit = call["cores"] * 13 / worked
    assert call["work_bound_limit_images_per_second"] == pytest.approx(limit, rel=0.05)
    assert 0 < call["efficiency"] <= 1.05
    assert call["bottleneck"].startswith(("cores (", "waiting ("))
    assert call["tiles"] >= 12
    assert 0 <= call["padding_waste"] < 1
    assert call["peak_memory_mb"]["worker"] > 50


def test_counted_pixels_and_nodata_make_the_whole_picture(finished):
    run = open_run(str(finished.out))
    counted: dict[int, int] = {}
    for row in run.class_stats.to_pylist():
        counted[row["image_id"]] = counted.get(row["image_id"], 0) + row["pixel_count"]

    for row in run.images.to_pylist():
        if row["status"] == "done":
            assert counted[row["image_id"]] + row["nodata_pixels"] == row["height"] * row["width"]
        else:
            assert row["image_id"] not in counted
            assert (row["height"], row["pixel_start"], row["nodata_pixels"]) == (None, None, None)
    assert run.row("loose/see-through.png")["nodata_pixels"] == 10 * 60


def columns(path) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in pq.read_schema(path)]


def test_the_columns_of_the_final_tables_are_frozen(finished):
    final = finished.out / "final"

    assert columns(final / "images.parquet") == [
        ("image_id", "int64"), ("key", "string"), ("uri", "string"), ("status", "string"),
        ("station", "string"), ("reason", "string"), ("height", "int32"), ("width", "int32"),
        ("input_bytes", "int64"), ("etag", "string"), ("sha256", "string"), ("fragment", "int32"),
        ("pixel_start", "int64"), ("mask_index", "int64"), ("path", "string"),
        ("byte_offset", "int64"), ("byte_nbytes", "list<element: int32>"),
        ("nodata_pixels", "int64"), ("seam_score", "float"), ("mean_confidence", "float"),
        ("model_version", "string"),
    ]  # fmt: skip
    assert columns(final / "class_stats.parquet") == [
        ("image_id", "int64"), ("class_id", "uint16"), ("pixel_count", "int64"),
        ("fraction", "float"), ("mean_confidence", "float"),
    ]  # fmt: skip
    assert columns(final / "rejected.parquet") == [
        ("image_id", "int64"), ("key", "string"), ("uri", "string"), ("station", "string"),
        ("reason", "string"), ("detail", "string"), ("input_bytes", "int64"), ("etag", "string"),
        ("sha256", "string"), ("fragment", "int32"),
    ]  # fmt: skip
    assert columns(final / "fragments.parquet") == [
        ("fragment", "int32"), ("round", "int32"), ("path", "string"), ("token", "string"),
        ("nbytes", "int64"), ("header_nbytes", "int64"), ("data_crc32c", "uint32"),
        ("n_done", "int32"), ("n_rejected", "int32"), ("etag", "string"),
    ]  # fmt: skip
    assert columns(finished.out / "plan/000.parquet") == [
        ("image_id", "int64"), ("key", "string"), ("uri", "string"), ("member", "string"),
        ("offset", "int64"), ("nbytes", "int64"), ("etag", "string"), ("format", "string"),
        ("fragment", "int32"), ("problem", "string"), ("change", "string"), ("replaces", "int64"),
    ]  # fmt: skip


def test_the_files_of_a_run_are_frozen(finished):
    assert tree(finished.out) == {
        "run.json", "receipt.json", "overview.png",
        "bundle/model.json", "bundle/weights.safetensors",
        "plan/000.parquet", "plan/000.fragments.parquet",
        "attempts/0/0", "attempts/1/0", "attempts/2/0", "attempts/3/0",
        "masks.zarr/zarr.json", "masks.zarr/mask/zarr.json",
        "masks.zarr/mask/c/0", "masks.zarr/mask/c/1", "masks.zarr/mask/c/2", "masks.zarr/mask/c/3",
        "final/images.parquet", "final/class_stats.parquet", "final/rejected.parquet",
        "final/fragments.parquet", "manifest/000.json",
    }  # fmt: skip


def test_the_json_of_a_run_has_frozen_keys(finished):
    def keys(path):
        return set(json.loads((finished.out / path).read_text()))

    assert keys("run.json") == {
        "format_version", "run_id", "token", "created", "config", "fingerprint", "bundle", "frozen",
        "versions", "sha256",
    }  # fmt: skip
    assert keys("manifest/000.json") == {
        "format_version",
        "run_id",
        "round",
        "finished",
        "token",
        "model",
        "counts",
        "tables",
        "sha256",
    }
    assert keys("receipt.json") >= {"run_id", "finished", "model", "round", "counts", "skipped"}
    frozen = json.loads((finished.out / "run.json").read_text())["frozen"]
    assert set(frozen) == {"budget", "layout", "grid", "inference"}
    attributes = json.loads((finished.out / "masks.zarr/zarr.json").read_text())["attributes"]
    assert attributes["flag_values"] == [0, 1]
    assert attributes["flag_meanings"] == "background nucleus"
    assert [c["name"] for c in attributes["ontology"]["classes"]] == ["background", "nucleus"]


def test_zarr_alone_reads_every_mask(finished):
    run = open_run(str(finished.out))
    array = zarr.open_array(finished.out / "masks.zarr/mask", mode="r")

    assert array.dtype == np.uint8
    assert array.shape[0] % array.shards[0] == 0
    for row in run.images.to_pylist():
        if row["status"] == "done":
            area = row["height"] * row["width"]
            flat = array[row["pixel_start"] : row["pixel_start"] + area]
            assert np.array_equal(flat.reshape(row["height"], row["width"]), run.mask(row["key"]))


def test_the_sheet_and_the_data_set_are_there(finished):
    run = open_run(str(finished.out))
    data = run.torch_dataset(pictures=True)

    assert (finished.out / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert len(data) == 12
    first = data[0]
    assert first["key"] == "loose/a.jpg"
    assert np.array_equal(first["mask"].numpy(), run.mask("loose/a.jpg"))
    assert tuple(first["image"].shape) == (3, 64, 80)
    with pytest.raises(KeyError, match="truncated"):
        run.mask("loose/broken.jpg")
    with pytest.raises(KeyError, match="not in"):
        run.mask("loose/never.jpg")


# -- the same answer, however it is computed -----------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {"compute": {"workers": 3, "decode_threads": 3, "fetch_threads": 8}},
        {"fragment": {"images": 1}},
        {"fragment": {"bytes": 9000}, "batch": {"window_mb": 1, "pixels": 1}},
    ],
    ids=["threads", "fragments-of-one", "batches-of-one"],
)
def test_threads_fragments_and_batches_do_not_change_a_mask(finished, tmp_path, knobs):
    segment(finished.source, tmp_path / "out", finished.model, slot_bytes=4096, **knobs)

    one, other = open_run(str(finished.out)), open_run(str(tmp_path / "out"))
    assert other.class_stats.equals(one.class_stats)
    for key in KEYS:
        if key != "loose/broken.jpg":
            assert np.array_equal(one.mask(key), other.mask(key))


def test_where_nothing_is_compiled_a_run_says_so_and_ends_the_same(
    finished, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(kernels, "LIBRARY", None)
    caplog.set_level("INFO", "maskfleet")

    segment(finished.source, tmp_path / "out", finished.model, slot_bytes=4096)

    assert "is not compiled where this runs" in caplog.text
    with_c, without = content(finished.out), content(tmp_path / "out")
    assert without["masks"].keys() == with_c["masks"].keys()
    assert without["rejected"] == with_c["rejected"]
    for key, (shape, labels) in without["masks"].items():
        same = np.frombuffer(labels, np.uint8) == np.frombuffer(with_c["masks"][key][1], np.uint8)
        assert shape == with_c["masks"][key][0]
        assert same.mean() > 0.999  # two classes may be level up to rounding


def test_every_orientation_gives_the_mask_of_the_upright_picture(tmp_path, tiny_bundle):
    # Constant blocks of 8 x 8 survive JPEG in any orientation, so that the pixels are equal.
    coarse = np.random.default_rng(3).integers(0, 5, (8, 11)).astype(np.uint8) * 50
    upright = np.kron(coarse, np.ones((8, 8), np.uint8))[..., None].repeat(3, axis=2)
    source = filled(
        tmp_path / "in", {f"{n}.jpg": with_orientation(upright, n) for n in range(1, 9)}
    )

    segment(source, tmp_path / "out", tiny_bundle)

    run = open_run(str(tmp_path / "out"))
    expected = run.mask("1.jpg")
    assert expected.shape == (64, 88)
    assert 0 < expected.mean() < 1
    for n in range(2, 9):
        assert np.array_equal(run.picture(f"{n}.jpg"), run.picture("1.jpg")), n
        assert np.array_equal(run.mask(f"{n}.jpg"), expected), n


def test_a_tiled_picture_has_the_mask_of_the_untiled_one_and_a_seam_score(tmp_path, tiny_bundle):
    source = filled(tmp_path / "in", {"a.png": png(300, 420, 1), "b.png": png(60, 60, 2)})
    masks = {}
    for size in (96, 512):
        out = tmp_path / str(size)
        place = InProcess(window_segmenter(files_of(tiny_bundle)))
        segment(source, out, tiny_bundle, place, tile={"size": size, "overlap": 48})
        run = open_run(str(out))
        masks[size] = run.mask("a.png")
        assert run.row("a.png")["seam_score"] == (0.0 if size == 96 else None)
        assert run.row("b.png")["seam_score"] is None
        assert problems(out) == []

    assert masks[96].shape == (300, 420)
    assert (masks[96] != masks[512]).mean() < 1e-4


def test_a_model_that_sees_everything_is_tiled_with_a_measured_seam(tmp_path, tiny_bundle):
    source = filled(tmp_path / "in", {"a.png": png(300, 420, 1)})

    segment(source, tmp_path / "out", tiny_bundle)  # the bundle's tile: 160 with 32 shared

    run = open_run(str(tmp_path / "out"))
    assert 0 < run.row("a.png")["seam_score"] < 0.5
    assert run.mask("a.png").shape == (300, 420)
    assert problems(tmp_path / "out") == []


# -- layouts -------------------------------------------------------------------------------------


def test_the_stacked_layout_holds_one_mask_a_row_and_misfits_apart(tmp_path, tiny_bundle):
    source = filled(
        tmp_path / "in",
        {
            **{f"{i}.png": png(40, 48, i) for i in range(6)},
            "bad.jpg": b"",
            "odd.png": png(50, 30, 9),
        },
    )
    flat, stacked = tmp_path / "flat", tmp_path / "stacked"
    segment(source, flat, tiny_bundle)

    segment(source, stacked, tiny_bundle, layout="stacked", size="40x48")

    one, other = open_run(str(flat)), open_run(str(stacked))
    array = zarr.open_array(stacked / "masks.zarr/mask", mode="r")
    assert array.shape[1:] == (40, 48)
    for row in other.images.to_pylist():
        if row["status"] != "done":
            continue
        assert np.array_equal(other.mask(row["key"]), one.mask(row["key"]))
        if row["key"] == "odd.png":
            assert row["path"] == "masks.zarr/large/7"
            large = zarr.open_array(stacked / row["path"] / "0", mode="r")
            assert np.array_equal(large[:], one.mask("odd.png"))
        else:
            assert np.array_equal(array[row["mask_index"]], one.mask(row["key"]))
    assert other.class_stats.drop_columns("mean_confidence").equals(
        one.class_stats.drop_columns("mean_confidence")
    )
    assert problems(stacked) == []


def test_the_stacked_layout_finds_the_size_that_all_share_or_asks_for_it(tmp_path, tiny_bundle):
    same = uniform(tmp_path / "same", 3)
    segment(same, tmp_path / "out", tiny_bundle, layout="stacked")
    assert zarr.open_array(tmp_path / "out/masks.zarr/mask", mode="r").shape == (16, 40, 48)

    mixed = filled(tmp_path / "mixed", {"a.png": png(40, 48, 1), "b.png": png(41, 48, 1)})
    with pytest.raises(RunRefused, match="--size HxW"):
        segment(mixed, tmp_path / "other", tiny_bundle, layout="stacked")


def test_the_confidence_is_a_second_row_of_the_same_object(finished, tmp_path):
    segment(finished.source, tmp_path / "out", finished.model, slot_bytes=4096, confidence=True)

    run, plain = open_run(str(tmp_path / "out")), open_run(str(finished.out))
    array = zarr.open_array(tmp_path / "out/masks.zarr/mask", mode="r")
    assert array.shape[0] == 2
    for row in run.images.to_pylist():
        if row["status"] == "done":
            area = row["height"] * row["width"]
            both = array[:, row["pixel_start"] : row["pixel_start"] + area]
            both = both.reshape(2, row["height"], row["width"])
            assert np.array_equal(both[0], plain.mask(row["key"]))
            assert np.array_equal(both[1], run.confidence(row["key"]))
            data = both[0] != 255
            assert np.all(both[1][~data] == 0)
            assert both[1][data].mean() / 255 == pytest.approx(row["mean_confidence"], abs=0.004)
    assert problems(tmp_path / "out") == []
    with pytest.raises(RunRefused, match="--confidence"):
        plain.confidence("loose/a.jpg")


def test_a_picture_that_takes_more_than_a_quarter_of_the_slots_gets_an_array_of_its_own(
    tmp_path, tiny_bundle, monkeypatch
):
    monkeypatch.setattr("pipeline.create.N_SLOTS", 64)  # so that 17 slots are too many
    source = filled(
        tmp_path / "in",
        {"a.png": png(40, 48, 1), "just.png": png(256, 256, 2), "wide.png": png(210, 320, 3)},
    )
    place = InProcess(window_segmenter(files_of(tiny_bundle)))
    tile = {"size": 96, "overlap": 48}

    segment(
        source, tmp_path / "out", tiny_bundle, place, slot_bytes=4096, confidence=True, tile=tile
    )

    run = open_run(str(tmp_path / "out"))
    row = run.row("wide.png")
    assert (row["path"], row["pixel_start"]) == ("masks.zarr/large/2", None)
    group = zarr.open_group(tmp_path / "out" / row["path"], mode="r")
    mask = run.mask("wide.png")
    assert mask.shape == (210, 320)
    assert np.array_equal(group["0"][:], mask)
    assert np.array_equal(group["3"][:], mask[::8, ::8])
    assert np.array_equal(group["confidence"][:], run.confidence("wide.png"))
    assert run.row("a.png")["path"] is run.row("just.png")["path"] is None
    assert problems(tmp_path / "out") == []

    # The same picture in slots has the same mask.
    monkeypatch.undo()
    segment(source, tmp_path / "slots", tiny_bundle, place, slot_bytes=4096, tile=tile)
    other = open_run(str(tmp_path / "slots"))
    assert other.row("wide.png")["path"] is None
    assert np.array_equal(other.mask("wide.png"), mask)
    names = ["image_id", "class_id", "pixel_count", "fraction"]
    assert other.class_stats.select(names).equals(run.class_stats.select(names))


# -- hostile archives ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_of_a_hostile_archive_every_file_is_accounted_for(tmp_path, tiny_bundle):
    good = {f"good/{i}.png": png(30 + i, 40, i) for i in range(6)}
    good["zz-good.tar"] = archives.tar_of({f"{i}.jpg": jpeg(40, 40, i) for i in range(3)})
    alone = filled(tmp_path / "alone", good)
    segment(alone, tmp_path / "expected", tiny_bundle)
    source = filled(tmp_path / "in", good)
    for name, (broken, _) in hostile.cases().items():
        path = (
            (source / name)
            if isinstance(name, str)
            else source.joinpath(name.decode("utf-8", "surrogateescape"))
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(broken)

    outcome = segment(source, tmp_path / "out", tiny_bundle, fragment={"images": 64})

    assert outcome.exit_code == EXIT_REJECTIONS
    run, expected = open_run(str(tmp_path / "out")), open_run(str(tmp_path / "expected"))
    listing = Listing()
    config = from_mapping({"source": str(source), "out": "/out"})
    planned = {key_of(f, e) for f, _, e in discover(LocalStore(source), config, listing)}
    rows = {row["key"]: row for row in run.images.to_pylist()}
    assert set(rows) == planned
    assert outcome.receipt["skipped"] == dict(sorted(listing.skipped.items()))
    assert all(row["reason"] in REASONS for row in rows.values() if row["status"] == "rejected")
    unaccounted = [
        name for name, (_, must) in hostile.cases().items()
        if must != hostile.EITHER and isinstance(name, str) and "#" not in name and "%" not in name
        and "\n" not in name and "\t" not in name and not name.startswith("shards/")
        and not (name in rows and (rows[name]["status"] == must))
        and not name.rpartition("/")[2].startswith(".")
    ]  # fmt: skip
    assert unaccounted == []
    for row in expected.images.to_pylist():
        assert np.array_equal(run.mask(row["key"]), expected.mask(row["key"])), row["key"]
    assert problems(tmp_path / "out") == []


@pytest.mark.parametrize("shard", sorted(hostile.shards()))
def test_a_hostile_shard_costs_only_its_own_members(tmp_path, tiny_bundle, shard):
    content, members = hostile.shards()[shard]
    source = filled(tmp_path / "in", {"s.tar": content, "good.png": png(30, 30, 1)})

    segment(source, tmp_path / "out", tiny_bundle, fragment={"images": 1000})

    rows = {r["key"]: r["status"] for r in open_run(str(tmp_path / "out")).images.to_pylist()}
    assert rows.pop("good.png") == "done"
    for member, must in members.items():
        assert must in (hostile.EITHER, rows[f"s.tar#{member}"]), member
    assert problems(tmp_path / "out") == []


def test_a_picture_that_goes_or_changes_after_it_was_planned_costs_only_itself(
    tmp_path, tiny_bundle
):
    source = uniform(tmp_path / "in", 6)

    class Meddler(InProcess):
        def run(self, tasks, run_uri, stop):
            (source / "001.png").unlink()
            (source / "004.png").write_bytes(png(40, 48, 99))
            yield from super().run(tasks, run_uri, stop)

    outcome = segment(source, tmp_path / "out", tiny_bundle, Meddler())

    assert outcome.counts.rejected == {"changed": 1, "vanished": 1}
    assert outcome.counts.done == 4


@pytest.mark.parametrize("what", ["renamed", "unmounted"])
def test_a_source_that_goes_in_mid_run_stops_it_and_rejects_nothing(tmp_path, tiny_bundle, what):
    source, elsewhere, out = uniform(tmp_path / "in", 6), tmp_path / "elsewhere", tmp_path / "out"

    class Meddler(InProcess):
        def run(self, tasks, run_uri, stop):
            source.rename(elsewhere)
            if what == "unmounted":
                source.mkdir()  # the mount point
            yield from super().run(tasks, run_uri, stop)

    with pytest.raises(RunUnfinished, match="run the same command again"):
        segment(source, out, tiny_bundle, Meddler())
    assert commits(out) == {}

    shutil.rmtree(source, ignore_errors=True)
    elsewhere.rename(source)
    assert segment(source, out, tiny_bundle).counts.done == 6
    assert problems(out) == []


def test_a_plan_that_leads_out_of_the_source_is_not_followed(tmp_path, tiny_bundle):
    source, out = uniform(tmp_path / "in", 2), tmp_path / "out"
    (tmp_path / "secret").write_bytes(b"secret")

    class Meddler(InProcess):
        def run(self, tasks, run_uri, stop):
            plan = out / "plan/000.parquet"
            rows = pq.read_table(plan)
            keys = pa.array(["../secret", *rows["key"].to_pylist()[1:]], rows["key"].type)
            changed = rows.set_column(1, "key", keys)
            assert rows.column_names[1] == "key"
            pq.write_table(changed, plan, row_group_size=2)
            yield from super().run(tasks, run_uri, stop)

    with pytest.raises(RunUnfinished, match="leads out of"):
        segment(source, out, tiny_bundle, Meddler())
    assert commits(out) == {}


# -- refusals before anything is spent -----------------------------------------------------------


def test_a_store_that_ignores_conditions_is_refused_before_anything_is_read(
    tmp_path, tiny_bundle, monkeypatch
):
    from pipeline import archive

    class Forgetful(LocalStore):
        def create(self, path, data):
            self.replace(path, data)
            return True

    def opened(uri):
        return Forgetful(tmp_path / "out") if uri.endswith("out") else LocalStore(uri_path(uri))

    def uri_path(uri):
        return tmp_path.__class__(uri)

    monkeypatch.setattr(archive, "open_store", opened)
    with pytest.raises(RunRefused, match="If-None-Match"):
        segment(uniform(tmp_path / "in", 2), tmp_path / "out", tiny_bundle)

    assert Ledger.find(LocalStore(tmp_path / "out")) is None


def test_a_clean_archive_ends_with_exit_0(tmp_path, tiny_bundle):
    outcome = segment(uniform(tmp_path / "in", 3), tmp_path / "out", tiny_bundle)

    assert outcome.exit_code == EXIT_DONE
    assert io.BytesIO((tmp_path / "out/overview.png").read_bytes()).read(4) == b"\x89PNG"


def test_fragments_that_share_batches_make_the_same_run(finished, tmp_path, tiny_bundle):
    knobs = {"batch": {"mix": True, "pixels": 10**9}, "fragment": {"images": 2}}
    workers = {"compute": {"workers": 3}}
    segment(finished.source, tmp_path / "mixed", tiny_bundle, **knobs, **workers)
    segment(finished.source, tmp_path / "alone", tiny_bundle, fragment={"images": 2})

    assert content(tmp_path / "mixed") == content(tmp_path / "alone")
