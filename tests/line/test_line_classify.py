"""A classifier over an archive: one class per picture, committed and counted like masks."""

import hashlib
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import models
from pipeline import open_run
from pipeline.decode import DecodeLimits, decode
from pipeline.errors import EXIT_REJECTIONS, ImageRejected, RunRefused
from pipeline.fragment import assemble, read_header
from pipeline.ledger import Ledger
from pipeline.scaling import scaled, size_read
from pipeline.status import status
from pipeline.storage import open_store
from tests import archives
from tests.archives import copied, filled, png, problems, segment, tree, uniform
from tests.bundles import KINDS, InProcess, brightness_segmenter, files_of, tiny_classifier
from tests.line.test_line_run import KEYS, columns, every_picture
from tests.pictures import blobs, encoded, turned, with_orientation

C = "predictions/c"
CLOSE = 1e-3  # rounding in other kernels, stretched as the scores of an untrained net are


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_classifier):
    """An archive of 13 images (`archives.mixed`), its classifying run, and how the call ended."""
    folder = tmp_path_factory.mktemp("classify")
    source, out = archives.mixed(folder / "in"), folder / "out"
    outcome = segment(source, out, tiny_classifier)
    return SimpleNamespace(source=source, out=out, outcome=outcome, model=tiny_classifier)


@pytest.fixture
def run(finished, tmp_path):
    return copied(finished.out, tmp_path / "run")


# -- the oracle ----------------------------------------------------------------------------------


@torch.inference_mode()
def by_hand(model, data, size=None, longest=160):
    """Probabilities of a picture: a plain loop's body, its scaling written down once more."""
    values = decode(data, DecodeLimits()).values_HWC
    height, width = values.shape[:2]
    shrink = longest / max(height, width)
    if size is None and shrink < 1:
        size = round(height * shrink), round(width * shrink)
    if size is not None and size != (height, width):
        deep = values.dtype == np.uint16
        planes = [
            Image.fromarray(values[..., c].astype(np.float32) if deep else values[..., c])
            for c in range(values.shape[2])
        ]
        planes = [np.asarray(p.resize(size[::-1], Image.Resampling.BILINEAR)) for p in planes]
        values = np.stack(planes, 2).round().astype(values.dtype)
    x_HWC = values.astype(np.float32) / np.iinfo(values.dtype).max
    x_HWC = (np.repeat(x_HWC, 3 // x_HWC.shape[2], axis=2) - 0.2) / 0.25
    pad = [(0, max(0, model.min_side - side)) for side in x_HWC.shape[:2]]
    x_HWC = np.pad(x_HWC, (*pad, (0, 0)))
    return model(torch.from_numpy(x_HWC).permute(2, 0, 1)[None]).softmax(1)[0].numpy()


def assert_equals_a_plain_loop(source, out, bundle, size=None):
    """Every prediction of a run of `archives.mixed`; returns the labels."""
    model, _ = models.load_bundle(bundle)
    read, seen, rejected = open_run(str(out)), [], {}
    for key, data in every_picture(source).items():
        try:
            expected = by_hand(model, data, size)
        except ImageRejected as verdict:
            rejected[key] = (verdict.station, verdict.reason)
            continue
        said = read.prediction(key)
        np.testing.assert_allclose(said["probabilities"], expected, rtol=0, atol=CLOSE)
        first = int(np.argmax(said["probabilities"]))
        assert (said["label"], said["name"]) == KINDS[first]
        assert said["confidence"] == said["probabilities"][first]
        seen.append(said["label"])
    assert len(seen) == 12
    assert rejected == {r["key"]: (r["station"], r["reason"]) for r in read.rejected.to_pylist()}
    return seen


def test_the_run_equals_a_plain_loop_over_the_model(finished):
    labels = assert_equals_a_plain_loop(finished.source, finished.out, finished.model)

    assert set(labels) == {i for i, _ in KINDS}  # the answers are not trivial


@pytest.mark.parametrize(("gray", "kind"), [(40, "dim"), (120, "middling"), (210, "bright")])
def test_probabilities_are_the_softmax_of_the_scores(tmp_path, tiny_classifier, gray, kind):
    even = np.full((20, 30, 3), gray, np.uint8)
    source = filled(tmp_path / "in", {"a.png": encoded(even, "PNG")})

    segment(
        source,
        tmp_path / "out",
        tiny_classifier,
        InProcess(brightness_segmenter(files_of(tiny_classifier))),
    )

    said = open_run(str(tmp_path / "out")).prediction("a.png")
    scores = np.exp([-100 * (gray / 255 - mean) ** 2 for mean in (0.2, 0.5, 0.8)])
    assert said["name"] == kind
    np.testing.assert_allclose(said["probabilities"], scores / scores.sum(), atol=1e-5)
    assert problems(tmp_path / "out") == []


# -- what is written: a contract -----------------------------------------------------------------


def test_the_columns_of_the_predictions_are_frozen_and_the_others_as_ever(finished):
    final = finished.out / "final"
    schema = pq.read_schema(final / "predictions.parquet")

    assert columns(final / "predictions.parquet") == [
        ("image_id", "int64"), ("label", "uint16"), ("name", "string"), ("confidence", "float"),
        ("probabilities", "list<element: float>"),
    ]  # fmt: skip
    assert not any(field.nullable for field in schema)
    assert [name for name, _ in columns(final / "images.parquet")][-4:] == [
        "nodata_pixels", "seam_score", "mean_confidence", "model_version",
    ]  # fmt: skip
    assert pq.read_table(final / "class_stats.parquet", use_threads=False).num_rows == 0


def test_the_files_of_a_classifying_run_are_frozen_and_there_is_no_array(finished):
    assert tree(finished.out) == {
        "run.json", "receipt.json", "overview.png",
        "bundle/model.json", "bundle/weights.safetensors",
        "plan/000.parquet", "plan/000.fragments.parquet",
        "attempts/0/0", "attempts/1/0", "attempts/2/0", "attempts/3/0",
        "predictions/c/0", "predictions/c/1", "predictions/c/2", "predictions/c/3",
        "final/images.parquet", "final/class_stats.parquet", "final/rejected.parquet",
        "final/fragments.parquet", "final/predictions.parquet", "manifest/000.json",
    }  # fmt: skip


def test_every_image_is_in_one_state_and_the_counts_say_so(finished):
    read, outcome = open_run(str(finished.out)), finished.outcome

    assert read.images["key"].to_pylist() == KEYS
    assert outcome.exit_code == EXIT_REJECTIONS
    counts = outcome.counts
    assert (counts.planned, counts.done, counts.rejected) == (13, 12, {"truncated": 1})
    done = [r["image_id"] for r in read.images.to_pylist() if r["status"] == "done"]
    assert read.predictions["image_id"].to_pylist() == done
    now = status(Ledger.open(open_store(str(finished.out))))
    assert (now.planned, now.done, now.pending, now.finished) == (13, 12, 0, True)
    assert problems(finished.out) == []


def test_an_image_row_tells_of_the_upright_picture_and_of_no_place(finished):
    read = open_run(str(finished.out))
    row = read.row("loose/held.jpg")

    assert (row["height"], row["width"]) == (48, 72)
    assert row["mean_confidence"] == read.prediction("loose/held.jpg")["confidence"]
    places = ("pixel_start", "mask_index", "path", "byte_offset", "byte_nbytes")
    for name in (*places, "nodata_pixels", "seam_score"):
        assert read.images[name].null_count == 13, name
    pixels = sum(r["height"] * r["width"] for r in read.images.to_pylist() if r["status"] == "done")
    assert finished.outcome.counts.pixels == pixels


def test_the_manifest_names_the_predictions(finished):
    data = (finished.out / "final/predictions.parquet").read_bytes()
    entry = json.loads((finished.out / "manifest/000.json").read_text())["tables"]["predictions"]

    assert entry == {
        "path": "final/predictions.parquet",
        "rows": 12,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_a_fragment_is_a_header_and_nothing_else(finished):
    data = (finished.out / C / "1").read_bytes()

    header = read_header(data)
    assert len(data) == header.nbytes + 4  # the checksum of an index without entries
    assert header.predictions["image_id"].to_pylist() == [4, 5, 6, 7]


def test_the_sheet_shows_pictures_with_their_classes(finished):
    with Image.open(finished.out / "overview.png") as sheet:
        assert sheet.width > sheet.height  # four in a row, two rows


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
def test_threads_fragments_and_batches_do_not_change_a_prediction(finished, tmp_path, knobs):
    segment(finished.source, tmp_path / "out", finished.model, **knobs)

    one, other = open_run(str(finished.out)), open_run(str(tmp_path / "out"))
    assert other.predictions.equals(one.predictions)


def test_every_orientation_is_the_upright_picture(tmp_path, tiny_classifier):
    # Constant blocks of 8 x 8 survive JPEG in any orientation, so that the pixels are equal.
    coarse = np.random.default_rng(3).integers(0, 5, (8, 11)).astype(np.uint8) * 50
    upright = np.kron(coarse, np.ones((8, 8), np.uint8))[..., None].repeat(3, axis=2)
    assert not np.array_equal(turned(upright, 6), upright)
    source = filled(
        tmp_path / "in", {f"{n}.jpg": with_orientation(upright, n) for n in range(1, 9)}
    )

    segment(source, tmp_path / "out", tiny_classifier)

    said = open_run(str(tmp_path / "out")).predictions["probabilities"].to_pylist()
    assert said == said[:1] * 8


# -- the size at which pictures are read ---------------------------------------------------------


def test_a_bundle_that_names_a_size_reads_every_picture_at_it(tmp_path):
    bundle = tiny_classifier(tmp_path / "bundle", resize=(40, 24))
    source = archives.mixed(tmp_path / "in")

    segment(source, tmp_path / "out", bundle)

    assert_equals_a_plain_loop(source, tmp_path / "out", bundle, size=(40, 24))
    assert open_run(str(tmp_path / "out")).row("loose/a.jpg")["height"] == 64
    assert problems(tmp_path / "out") == []


def test_a_picture_beyond_the_tile_is_scaled_down_to_it(tmp_path, tiny_classifier):
    source = filled(tmp_path / "in", {"a.png": png(500, 300, 1)})
    sizes = []
    segmenter = brightness_segmenter(files_of(tiny_classifier))
    forward = segmenter.model.forward
    segmenter.model.forward = lambda x, sizes_B2: sizes.append(sizes_B2) or forward(x, sizes_B2)

    segment(source, tmp_path / "out", tiny_classifier, InProcess(segmenter))

    assert [each.tolist() for each in sizes] == [[[160, 96]]]  # the bundle's tile is 160
    row = open_run(str(tmp_path / "out")).row("a.png")
    assert (row["height"], row["width"]) == (500, 300)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, orientation):
    picture = with_orientation(blobs(900, 700, 4), orientation)
    reads = partial(size_read, resize=(48, 40), longest=160)

    small = decode(picture, DecodeLimits(), reads)

    assert small.whole == (900, 700)
    assert 2 * 48 <= small.height < 900 / 2
    assert 2 * 40 <= small.width < 700 / 2
    full_HWC = scaled(decode(picture, DecodeLimits()).values_HWC, (48, 40)).astype(int)
    assert np.abs(scaled(small.values_HWC, (48, 40)) - full_HWC).mean() < 4
    bundle = tiny_classifier(tmp_path / "bundle", resize=(48, 40))
    source = filled(tmp_path / "in", {"a.jpg": picture})
    segment(source, tmp_path / "out", bundle)
    row = open_run(str(tmp_path / "out")).row("a.jpg")
    assert (row["height"], row["width"]) == (900, 700)


def test_what_is_not_much_larger_or_no_jpeg_is_decoded_whole():
    reads = partial(size_read, resize=(48, 40), longest=160)

    for picture in (encoded(blobs(150, 120, 1), "JPEG"), encoded(blobs(900, 700, 1), "PNG")):
        assert np.array_equal(
            decode(picture, DecodeLimits(), reads).values_HWC,
            decode(picture, DecodeLimits()).values_HWC,
        )


def test_a_large_jpeg_that_is_cut_is_cut_at_any_size():
    picture = encoded(blobs(900, 700, 1), "JPEG")
    reads = partial(size_read, resize=(48, 40), longest=160)

    for cut in (len(picture) // 3, len(picture) // 2, len(picture) - 2):
        with pytest.raises(ImageRejected, match=r"truncated|corrupt"):
            decode(picture[:cut], DecodeLimits(), reads)


def test_the_tile_size_of_the_command_line_wins_over_the_bundles(tmp_path, tiny_classifier):
    source = filled(tmp_path / "in", {"a.png": png(200, 300, 1)})
    model, _ = models.load_bundle(tiny_classifier)

    segment(source, tmp_path / "out", tiny_classifier, tile={"size": 60})

    said = open_run(str(tmp_path / "out")).prediction("a.png")["probabilities"]
    expected = by_hand(model, (source / "a.png").read_bytes(), longest=60)
    np.testing.assert_allclose(said, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    ("upright", "resize", "expected"),
    [
        ((100, 200), None, (100, 200)),
        ((256, 256), None, (256, 256)),
        ((300, 512), None, (150, 256)),
        ((10_000, 3), None, (256, 1)),
        ((301, 512), None, (150, 256)),  # 150.5: to the even one
        ((100, 200), (224, 224), (224, 224)),
        ((1, 1), (224, 32), (224, 32)),
    ],
)
def test_the_size_is_a_rule_of_the_pictures_own_size(upright, resize, expected):
    assert size_read(upright, resize, longest=256) == expected


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint8, 3), (np.uint16, 1)])
def test_scaling_keeps_type_and_mean_and_does_not_alias(dtype, channels):
    most = np.iinfo(dtype).max
    board_HW = (np.indices((64, 96)).sum(0) % 2) * most
    board_HWC = np.repeat(board_HW[..., None], channels, axis=2).astype(dtype)

    small = scaled(board_HWC, (16, 24))

    assert (small.shape, small.dtype) == ((16, 24, channels), dtype)
    assert np.abs(small.astype(float) / most - 0.5).max() < 0.02  # neither black nor white
    flat = np.full((30, 20, channels), most - 3, dtype)
    assert np.all(scaled(flat, (7, 11)) == most - 3)
    assert scaled(flat, (30, 20)) is flat


@pytest.mark.parametrize("size", [(40, 30), (17, 64), (200, 128)])
def test_scaling_is_the_antialiased_bilinear_of_others(size):
    picture_HWC = blobs(100, 90, 5)
    x_BCHW = torch.from_numpy(picture_HWC.astype(np.float32)).permute(2, 0, 1)[None]

    theirs = interpolate(x_BCHW, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)

    assert np.abs(scaled(picture_HWC, size) - theirs.numpy()).max() <= 1  # whole values, two passes


def test_a_gray_classifier_reads_every_kind_of_picture(tmp_path):
    bundle = tiny_classifier(tmp_path / "bundle", channels=1, resize=(32, 32))

    outcome = segment(archives.mixed(tmp_path / "in"), tmp_path / "out", bundle)

    assert outcome.counts.done == 12
    assert problems(tmp_path / "out") == []


# -- knobs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"layout": "stacked"}, "--layout stacked"),
        ({"layout": "stacked", "size": "40x48"}, "--layout stacked"),
        ({"confidence": True}, "--confidence"),
        ({"slot_bytes": 4096}, "--slot-bytes"),
        ({"tile": {"overlap": 16}}, "--tile.overlap"),
    ],
)
def test_what_is_for_masks_is_refused_before_anything_is_written(
    tmp_path, tiny_classifier, knobs, words
):
    source = filled(tmp_path / "in", {"a.png": png(20, 20, 1)})
    for dry_run in (True, False):
        with pytest.raises(RunRefused, match=f"^{words}: .* is a classifier and .*; drop it"):
            segment(source, tmp_path / "out", tiny_classifier, dry_run=dry_run, **knobs)

    assert not (tmp_path / "out").exists()


def test_a_tile_size_beside_a_size_of_the_bundle_is_refused(tmp_path):
    bundle = tiny_classifier(tmp_path / "bundle", resize=(32, 32))
    source = filled(tmp_path / "in", {"a.png": png(20, 20, 1)})

    with pytest.raises(RunRefused, match=r"--tile\.size"):
        segment(source, tmp_path / "out", bundle, tile={"size": 64})


# -- reading back --------------------------------------------------------------------------------


def test_a_prediction_is_read_by_key(finished):
    read = open_run(str(finished.out))

    said = read.prediction("shard-000.tar#x/2.png")
    assert said["image_id"] == 9
    assert sum(said["probabilities"]) == pytest.approx(1)
    assert read.picture("shard-000.tar#x/2.png").shape == (40, 52, 3)
    with pytest.raises(KeyError, match=r"has no class: decode: truncated"):
        read.prediction("loose/broken.jpg")
    with pytest.raises(KeyError, match="not in"):
        read.prediction("loose/never.jpg")


def test_who_asks_a_classifying_run_for_masks_is_told_what_it_has(finished, tmp_path, tiny_bundle):
    read = open_run(str(finished.out))
    for ask in (lambda: read.mask("loose/a.jpg"), lambda: read.confidence("loose/a.jpg"),
                read.torch_dataset):  # fmt: skip
        with pytest.raises(RunRefused, match=r"one class per picture and no masks.*prediction"):
            ask()

    source = filled(tmp_path / "in", {"a.png": png(20, 20, 1)})
    segment(source, tmp_path / "out", tiny_bundle)
    masks = open_run(str(tmp_path / "out"))
    with pytest.raises(RunRefused, match=r"holds masks.*mask\(key\)"):
        masks.prediction("a.png")


def test_an_unfinished_run_shows_the_predictions_it_has(finished, run):
    shutil.rmtree(run / "manifest")
    (run / C / "2").unlink()

    read = open_run(str(run))
    assert read.predictions["image_id"].to_pylist() == [0, 1, 3, 4, 5, 6, 7, 12]
    assert read.prediction("loose/a.jpg") == open_run(str(finished.out)).prediction("loose/a.jpg")


# -- verify --------------------------------------------------------------------------------------


def rewritten(path, images=None, stats=None, predictions=None, behind=b""):
    """Write a fragment's object again with valid checksums, but saying something else."""
    header = read_header(path.read_bytes())
    tables = [header.images, header.class_stats, header.predictions]
    rows = [table.to_pylist() for table in tables]
    for edit, value in zip((images, stats, predictions), rows, strict=True):
        if edit:
            edit(value)
    made = [pa.Table.from_pylist(r, t.schema) for r, t in zip(rows, tables, strict=True)]
    frames = [behind] if behind else []
    path.write_bytes(assemble(header.about, *made[:2], frames, [0] * len(frames), 0, made[2]))


def stat(image_id):
    return {"image_id": image_id, "class_id": 3, "pixel_count": 1, "fraction": 1.0}


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({"predictions": lambda p: p[0].update(label=200 - p[0]["label"])}, "label"),
        ({"predictions": lambda p: p[0].update(label=9)}, "label 9"),
        ({"predictions": lambda p: p[0].update(name="cat")}, "(cat) is not its most probable"),
        ({"predictions": lambda p: p[0].update(confidence=0.5)}, "confidence 0.5 is not"),
        (
            {"predictions": lambda p: p[0]["probabilities"].__setitem__(0, 0.9999)},
            "probabilities sum to",
        ),
        ({"predictions": lambda p: p[0]["probabilities"].append(0.0)}, "4 probabilities for 3"),
        ({"predictions": lambda p: p.pop()}, "not one for each image that is done"),
        ({"predictions": lambda p: p.append(p[0])}, "not one for each image that is done"),
        (
            {"predictions": lambda p: p.insert(2, {**p[0], "image_id": 2})},  # a rejected one
            "not one for each image that is done",
        ),
        ({"predictions": lambda p: p.reverse()}, "not one for each image that is done"),
        ({"images": lambda i: i[0].update(mean_confidence=0.1)}, "confidence"),
        ({"images": lambda i: i[0].update(pixel_start=0)}, "says where its mask lies"),
        ({"images": lambda i: i[0].update(nodata_pixels=0)}, "says where its mask lies"),
        ({"images": lambda i: i[0].update(key="another.jpg")}, "of the plan"),
        ({"images": lambda i: i[0].update(model_version="other@1")}, "made by other@1"),
        ({"stats": lambda s: s.append(stat(0))}, "not those of a classifier"),
    ],
)
def test_what_does_not_fit_together_is_found_behind_valid_checksums(run, edits, words):
    rewritten(run / C / "0", **edits)

    assert any(f"{C}/0" in text and words in text for text in problems(run)), problems(run)


def test_a_fragment_of_masks_among_the_predictions_is_found(run):
    header = read_header((run / C / "0").read_bytes())
    about = {key: value for key, value in header.about.items() if key != "predictions"}
    (run / C / "0").write_bytes(assemble(about, header.images, header.class_stats, [], [], 0))

    assert any("not those of a classifier" in text for text in problems(run))


def test_a_flipped_byte_anywhere_is_found(run):
    path = run / C / "1"
    whole = path.read_bytes()
    for at in [0, 5, 9, 13, 40, 200, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert any(f"{C}/1" in text for text in problems(run)), at
    path.write_bytes(whole + b"\0\0\0\0")
    assert any(f"{C}/1" in text for text in problems(run))
    path.write_bytes(whole)
    assert problems(run) == []


@pytest.mark.parametrize("name", ["99", "foreign", "0/0", "1.tmp"])
def test_what_does_not_belong_among_the_commits_is_found(run, name):
    if name == "0/0":
        (run / C / "7").mkdir()
        name = "7/0"
    (run / C / name).write_bytes(b"?")

    assert f"{C}/{name}: committed, but no plan asks for it" in problems(run)


def test_a_final_table_that_is_gone_or_changed_is_found_and_comes_back(finished, run):
    path = run / "final/predictions.parquet"
    whole = path.read_bytes()

    path.write_bytes(whole[:-1] + b"x")
    assert any("final/predictions.parquet" in text for text in problems(run))
    path.unlink()
    assert any("final/predictions.parquet" in text for text in problems(run))

    segment(finished.source, run, finished.model)
    assert path.read_bytes() == whole
    assert problems(run) == []


# -- memory --------------------------------------------------------------------------------------


def test_a_picture_that_does_not_fit_the_memory_is_rejected_and_no_other(tmp_path, tiny_classifier):
    source = filled(tmp_path / "in", {f"{n}.png": png(40, 48 + 40 * n, n) for n in range(3)})
    segmenter = brightness_segmenter(files_of(tiny_classifier))
    forward = segmenter.model.forward

    def small_memory(x_BCHW, sizes_B2):
        if x_BCHW.shape[3] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x_BCHW, sizes_B2)

    segmenter.model.forward = small_memory

    outcome = segment(source, tmp_path / "out", tiny_classifier, InProcess(segmenter))

    assert outcome.counts.rejected == {"too_large": 1}
    assert open_run(str(tmp_path / "out")).rejected["key"].to_pylist() == ["2.png"]
    assert problems(tmp_path / "out") == []


# -- rounds --------------------------------------------------------------------------------------


def test_a_grown_archive_costs_only_what_is_new_and_final_holds_the_newest(
    tmp_path, tiny_classifier
):
    source, out = uniform(tmp_path / "in", 6), tmp_path / "out"
    filled(source, {"bad.png": b"\x89PNG\r\n\x1a\n"})
    segment(source, out, tiny_classifier)
    before = open_run(str(out)).predictions.to_pylist()

    (source / "000.png").unlink()
    filled(source, {"003.png": png(64, 20, 77), "new.png": png(30, 31, 78)})
    outcome = segment(source, out, tiny_classifier)

    read = open_run(str(out))
    assert outcome.receipt["this_call"]["images"] == 2
    assert (outcome.counts.planned, outcome.counts.done) == (7, 6)
    assert read.predictions["image_id"].to_pylist() == [1, 2, 4, 5, 7, 8]
    assert read.predictions.to_pylist()[:4] == [r for r in before if r["image_id"] in {1, 2, 4, 5}]
    assert read.prediction("003.png")["image_id"] == 7
    assert Ledger.open(open_store(str(out))).manifests() == [0, 1]
    assert problems(out) == []


def test_a_retry_answers_the_named_reason_again(tmp_path, tiny_classifier):
    source, out = uniform(tmp_path / "in", 4), tmp_path / "out"
    filled(source, {"empty.png": b""})

    class Hiding(InProcess):
        def run(self, tasks, run_uri, stop):
            hidden = (source / "002.png").rename(tmp_path / "hidden")
            yield from super().run(tasks, run_uri, stop)
            hidden.rename(source / "002.png")

    first = segment(source, out, tiny_classifier, Hiding())
    assert first.counts.rejected == {"empty": 1, "vanished": 1}

    second = segment(source, out, tiny_classifier, retry=["vanished"])

    assert second.counts.rejected == {"empty": 1}
    assert open_run(str(out)).prediction("002.png")["image_id"] == 5
    assert problems(out) == []


def test_an_archive_of_bad_pictures_leaves_an_empty_table(tmp_path, tiny_classifier):
    source = filled(tmp_path / "in", {"a.png": b"", "b.jpg": b"\xff\xd8\xff"})

    outcome = segment(source, tmp_path / "out", tiny_classifier)

    assert outcome.counts.n_rejected == 2
    assert open_run(str(tmp_path / "out")).predictions.num_rows == 0
    assert not (tmp_path / "out/overview.png").exists()
    assert problems(tmp_path / "out") == []
