"""The config: strict, with the nearest name, and what of it belongs to a run."""

import pytest

from pipeline.config import SegmentConfig, fingerprint, from_mapping, known_names
from pipeline.errors import RunRefused

LEAST = {"source": "/in", "out": "/out"}


def made(**knobs) -> SegmentConfig:
    return from_mapping({**LEAST, **knobs})


def refusal(**knobs) -> str:
    with pytest.raises(RunRefused) as refused:
        made(**knobs)
    return str(refused.value)


@pytest.mark.parametrize(
    ("knobs", "wrong", "near"),
    [
        ({"modle": "x"}, "modle", "model"),
        ({"tile": {"sizes": 5}}, "tile.sizes", "tile.size"),
        ({"batch": {"pixel": 5}}, "batch.pixel", "batch.pixels"),
        ({"dryrun": True}, "dryrun", "dry_run"),
        ({"compute": {"worker": 2}}, "compute.worker", "compute.workers"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(knobs, wrong, near):
    message = refusal(**knobs)

    assert f"{wrong!r}" in message
    assert f"did you mean {near!r}?" in message


def test_a_name_like_no_other_is_refused_without_a_guess():
    assert "did you mean" not in refusal(zzzzqqqq=1)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (
            {"tile": {"size": 256, "overlap": 200}},
            ["--tile.overlap 200", "--tile.size 256", "try 32"],
        ),
        ({"tile": {"size": 3}}, ["tile.size", "16", "3"]),
        ({"slot_bytes": 5000}, ["--slot-bytes 5000", "multiple of 4096"]),
        ({"size": "64x64"}, ["--size", "--layout stacked"]),
        ({"size": "64", "layout": "stacked"}, ["size", "'64'"]),
        ({"layout": "stacked", "confidence": True}, ["--confidence", "--layout stacked"]),
        ({"layout": "flatt"}, ["layout", "flat", "stacked", "flatt"]),
        ({"limit": 0}, ["limit", "0"]),
        ({"retry": ["vanishd"]}, ["vanishd", "did you mean vanished", "corrupt"]),
        ({"fragment": {"images": "many"}}, ["fragment.images", "many"]),
        ({"tile": {"taper": "round"}}, ["tile.taper", "gaussian", "round"]),
    ],
)
def test_a_bad_value_is_refused_with_name_value_and_way_out(knobs, words):
    message = refusal(**knobs)

    assert all(word in message for word in words), message


def test_all_that_is_wrong_is_said_at_once():
    message = refusal(limit=0, modle="x", batch={"pixels": -1})

    assert all(word in message for word in ("limit", "modle", "batch.pixels"))


def test_source_and_out_are_needed():
    with pytest.raises(RunRefused, match=r"source.*out"):
        from_mapping({})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        made().limit = 3


FREE = {
    "allow_removals": True,
    "on": "local", "out": "/elsewhere", "model": "x", "limit": 5, "retry": ["corrupt"],
    "dry_run": True, "log": "json", "interval_s": 3.0, "compute": {"workers": 7, "device": "cpu"},
}  # fmt: skip
BOUND = {
    "source": "/other", "include": ["*.jpg"], "exclude": ["*.png"], "format": "files",
    "layout": "stacked", "confidence": True, "slot_bytes": 65536, "fragment": {"images": 3},
    "decode": {"max_pixels": 7}, "tile": {"size": 64}, "batch": {"pixels": 9},
    "architecture": "acme.nets.unet", "inference": {"precision": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_change_the_answers_may_differ_from_call_to_call(name):
    assert made(**{name: FREE[name]}).identity() == made().identity()


@pytest.mark.parametrize("name", BOUND)
def test_what_decides_what_a_run_holds_is_part_of_its_identity(name):
    other = made(**{name: BOUND[name]})

    assert other.identity() != made().identity()
    assert fingerprint(other.identity()) != fingerprint(made().identity())


def test_every_knob_is_in_one_of_the_two_lists():
    assert set(FREE) | set(BOUND) | {"size"} == set(SegmentConfig.model_fields)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_every_knob_says_what_it_does():
    for name, field in SegmentConfig.model_fields.items():
        nested = getattr(field.annotation, "model_fields", None)
        assert nested is not None or (field.description or "").strip(), name
        for inner, inner_field in (nested or {}).items():
            assert (inner_field.description or "").strip(), f"{name}.{inner}"
            assert f"{name}.{inner}" in known_names()
