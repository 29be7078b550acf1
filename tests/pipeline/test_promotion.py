"""Promote what is better, refuse what is worse, and never be talked round by luck."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunRefused
from pipeline.promotion import (
    CANARIES,
    Rules,
    decision_record,
    described,
    description,
    judge,
)
from tests.evaluations import confusion, evaluation, labels, mended, model

QUICK = Rules(resamples=300)
IMAGES = 200


@pytest.fixture(scope="module")
def counts():
    """The champion's confusion on 200 images."""
    return confusion(labels(IMAGES), recall=0.8, seed=0)


@pytest.fixture(scope="module")
def champion(counts):
    return evaluation(counts)


def reason(decision, name):
    (found,) = (r for r in decision.reasons if r.name == name)
    return found


def shuffled(table, seed=0):
    return table.take(np.random.default_rng(seed).permutation(table.num_rows))


# -- the three candidates of every day -----------------------------------------------------------


def test_a_truly_better_candidate_is_promoted(counts, champion):
    decision = judge(champion, evaluation(mended(counts, 0.2)), QUICK)

    assert decision.verdict == "promote"
    main = reason(decision, "mIoU")
    assert QUICK.margin < main.low < main.value < main.high
    assert decision.probability == 1.0
    assert decision.candidate_miou - decision.champion_miou == pytest.approx(main.value)


def test_a_damaged_candidate_is_refused(counts, champion):
    decision = judge(champion, evaluation(mended(counts, -0.2)), QUICK)

    assert decision.verdict == "refuse"
    assert reason(decision, "mIoU").high < 0
    assert decision.probability == 0.0
    assert not reason(decision, "class 0").ok


def test_the_champion_with_luck_on_a_few_images_is_not_promoted(counts, champion):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        lucky = counts.copy()
        few = rng.choice(IMAGES, 4, replace=False)
        lucky[few] = mended(counts[few], 0.9)
        decision = judge(champion, evaluation(lucky), QUICK)

        assert decision.candidate_miou > decision.champion_miou
        assert decision.verdict != "promote"


def test_of_models_that_are_equally_good_hardly_one_is_promoted():
    rules = Rules(resamples=300, margin=0.0)
    verdicts = [
        judge(model(100, 0.8, seed, seed), model(100, 0.8, seed + 1000, seed), rules).verdict
        for seed in range(100)
    ]

    # One in forty by construction of the interval; 7 or more of 100 has a chance below 2 %.
    assert verdicts.count("promote") <= 6
    assert verdicts.count("undecided") >= 85


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    # The truth: the same two models on very many images.
    everything = 20_000
    truth = (
        judge(model(everything, 0.8), model(everything, 0.81, 1), Rules(resamples=100))
        .reasons[0]
        .value
    )
    held = 0
    for seed in range(100):
        old, new = model(100, 0.8, seed, seed), model(100, 0.81, seed + 1000, seed)
        main = judge(old, new, QUICK).reasons[0]
        held += main.low <= truth <= main.high

    assert 88 <= held <= 100  # of 95 expected; outside this has a chance below 1 %


# -- properties ----------------------------------------------------------------------------------

tables = st.builds(
    lambda images, recall, seed: (images, recall, seed),
    st.integers(2, 60),
    st.floats(0.2, 1.0),
    st.integers(0, 10**6),
)


@given(tables, st.floats(0.2, 1.0))
@settings(deadline=None, max_examples=30)
def test_swapping_the_two_turns_every_sign(one, other_recall):
    images, recall, seed = one
    a, b = model(images, recall, seed, seed), model(images, other_recall, seed + 1, seed)
    rules = Rules(resamples=100, part_images=2)
    there, back = judge(a, b, rules), judge(b, a, rules)

    assert there.probability == pytest.approx(1 - back.probability)
    for one_way, other_way in zip(there.reasons, back.reasons, strict=True):
        assert one_way.name == other_way.name
        if one_way.low is not None:
            assert one_way.value == pytest.approx(-other_way.value, abs=1e-12)
            assert one_way.low == pytest.approx(-other_way.high, abs=1e-12)
            assert one_way.high == pytest.approx(-other_way.low, abs=1e-12)
    assert not there.verdict == back.verdict == "promote"


@given(tables)
@settings(deadline=None, max_examples=30)
def test_a_candidate_that_answers_as_the_champion_does_is_refused(one):
    images, recall, seed = one
    table = model(images, recall, seed, seed)
    decision = judge(table, shuffled(table), replace(QUICK, images=2, resamples=100))

    assert decision.verdict == "refuse"  # certain not to be better; no limit is broken
    assert [r.name for r in decision.reasons if r.ok is False] == ["mIoU"]
    assert (decision.reasons[0].low, decision.reasons[0].high) == (0, 0)
    assert decision.probability == 0.5
    assert decision.changed == ()


@given(tables, st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_the_order_of_the_rows_does_not_matter(one, seed):
    images, recall, start = one
    a, b = model(images, recall, start, start), model(images, 0.8, start + 1, start)
    rules = Rules(resamples=100)

    assert judge(shuffled(a, seed), shuffled(b, seed + 1), rules) == judge(a, b, rules)


@given(tables)
@settings(deadline=None, max_examples=20)
def test_the_point_lies_where_summed_counts_put_it(one):
    images, recall, seed = one
    counts = confusion(labels(images, seed=seed), recall, seed)
    other = confusion(labels(images, seed=seed), 0.7, seed + 1)
    decision = judge(evaluation(counts), evaluation(other), Rules(resamples=100))

    assert decision.champion_miou == pytest.approx(plain_miou(counts))
    assert decision.candidate_miou == pytest.approx(plain_miou(other))


def plain_miou(counts):
    """As a textbook has it: one confusion matrix, one class at a time."""
    matrix = counts.sum(0)
    found = [
        matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k])
        for k in range(len(matrix))
        if matrix[k].sum()
    ]
    return sum(found) / len(found)


def test_a_margin_only_ever_makes_it_harder(counts, champion):
    better = evaluation(mended(counts, 0.1))
    main = judge(champion, better, QUICK).reasons[0]
    order = ["promote", "undecided", "refuse"]
    verdicts = [
        order.index(judge(champion, better, replace(QUICK, margin=margin)).verdict)
        for margin in (-0.1, main.low - 1e-9, main.low, main.value, main.high, main.high + 1e-9, 1)
    ]

    assert verdicts == sorted(verdicts)
    assert verdicts == [0, 0, 1, 1, 1, 2, 2]


def test_ten_thousand_images_of_twenty_classes_are_judged():
    labelled = labels(10_000, classes=20)
    counts = confusion(labelled, 0.8, seed=0)
    strata = ["day", "dusk"] * 5000
    decision = judge(evaluation(counts, strata), evaluation(mended(counts, 0.1), strata))

    assert decision.verdict == "promote"
    assert decision.images == 10_000
    assert len(decision.reasons) == 2 + 20 + 2 + 2


def test_what_is_drawn_at_a_time_is_a_matter_of_memory_only(monkeypatch):
    a, b = model(50, 0.8), model(50, 0.82, 1)
    whole = judge(a, b, QUICK)
    monkeypatch.setattr("pipeline.promotion.DRAWN", 50 * 7)

    assert judge(a, b, QUICK) == whole


# -- floors and limits ---------------------------------------------------------------------------


def spoiled_class(counts, which, share):
    """Better in all classes but one."""
    better = mended(counts, 0.6)
    better[:, which] = mended(counts, -share)[:, which]
    return better


def test_one_class_that_falls_outweighs_a_better_mean(counts, champion):
    decision = judge(champion, evaluation(spoiled_class(counts, 2, 0.2)), QUICK)

    assert decision.candidate_miou > decision.champion_miou + QUICK.margin
    assert decision.verdict == "refuse"
    assert [r.name for r in decision.reasons if r.ok is False] == ["class 2"]
    assert reason(decision, "class 2").high < -QUICK.class_floor

    generous = replace(QUICK, class_floor=0.5)
    assert judge(champion, evaluation(spoiled_class(counts, 2, 0.2)), generous).verdict == "promote"


def test_noise_in_a_rare_class_refuses_nothing(counts):
    rare = counts.copy()
    rare[:, 3] = rare[:, :, 3] = 0
    rare[:12, 3, 3], rare[:12, 3, 0] = 300, 100
    worse = mended(rare, 0.5)
    worse[:12, 3] = rare[:12, 3]
    worse[0, 3] = [400, 0, 0, 0]  # one image of twelve is lost
    decision = judge(evaluation(rare), evaluation(worse), QUICK)

    row = reason(decision, "class 3")
    assert row.value < -QUICK.class_floor < row.high
    assert row.ok is True
    assert decision.verdict == "promote"


def test_a_class_in_a_handful_of_images_is_not_judged(counts):
    rare = counts.copy()
    rare[:, 3] = 0
    rare[:3, 3, 3] = 5000
    worse = mended(rare, 0.3)
    worse[:3, 3] = [5000, 0, 0, 0]
    row = reason(judge(evaluation(rare), evaluation(worse), QUICK), "class 3")

    assert (row.ok, row.value, row.note) == (None, None, "not judged: 15000 pixels in 3 images")


def test_a_stratum_that_falls_outweighs_all_the_others(counts):
    strata = ["day"] * 170 + ["dusk"] * 30
    new = mended(counts, 0.3)
    new[170:] = mended(counts[170:], -0.2)
    old, new = evaluation(counts, strata), evaluation(new, strata)
    decision = judge(old, new, replace(QUICK, class_floor=1.0))

    assert decision.verdict == "refuse"
    assert [r.name for r in decision.reasons if r.ok is False] == ["stratum dusk"]
    assert reason(decision, "stratum day").value > 0


def test_images_without_a_stratum_belong_to_none_and_count_all_the_same(counts):
    strata = [None] * 150 + ["few"] * 5 + ["dusk"] * 45
    decision = judge(
        evaluation(counts, strata),
        evaluation(mended(counts, 0.2), strata),
        replace(QUICK, stratified=True),
    )

    assert decision.verdict == "promote"
    assert reason(decision, "stratum few").note == "not judged: 5 images"
    assert reason(decision, "stratum dusk").ok is True


def test_drawing_within_strata_narrows_the_interval_where_strata_differ():
    # Half of the images are easy and half hard, and only the hard ones change.
    labelled = labels(100)
    easy, hard = confusion(labelled[:50], 0.99, 0), confusion(labelled[50:], 0.4, 1)
    new = np.concatenate([easy, mended(hard, 0.5)])
    old = np.concatenate([easy, hard])
    strata = ["easy"] * 50 + ["hard"] * 50
    widths = {}
    for stratified in (False, True):
        rules = Rules(stratified=stratified)
        main = judge(evaluation(old, strata), evaluation(new, strata), rules).reasons[0]
        widths[stratified] = main.high - main.low

    assert widths[True] < 0.7 * widths[False]


def test_a_candidate_that_is_surer_than_right_is_refused(counts, champion):
    decision = judge(champion, evaluation(mended(counts, 0.3), overconfident=0.05), QUICK)

    assert decision.verdict == "refuse"
    row = reason(decision, "calibration error")
    assert (row.ok, row.value) == (False, pytest.approx(0.05))


def test_a_few_images_that_upset_the_calibration_refuse_nothing(counts, champion):
    surer = np.zeros(IMAGES)
    surer[:5] = 1.0
    decision = judge(champion, evaluation(mended(counts, 0.3), overconfident=surer), QUICK)

    row = reason(decision, "calibration error")
    assert row.low < QUICK.calibration < row.value
    assert (row.ok, decision.verdict) == (True, "promote")


def test_a_slow_candidate_is_refused(counts):
    old, new = evaluation(counts, seconds=0.1), evaluation(mended(counts, 0.3), seconds=0.16)
    decision = judge(old, new, QUICK)

    assert decision.verdict == "refuse"
    assert reason(decision, "seconds per megapixel").value == pytest.approx(1.6)
    assert judge(old, new, replace(QUICK, slowdown=1.7)).verdict == "promote"


def test_a_speed_that_nobody_measured_is_not_judged(counts, champion):
    decision = judge(champion, evaluation(mended(counts, 0.3), seconds=float("nan")), QUICK)

    assert decision.verdict == "promote"
    assert reason(decision, "seconds per megapixel").ok is None


def canaries(changed):
    return pa.table(
        {"key": ["a", "b"], "changed": changed, "pixels": [1000, 3000]}, schema=CANARIES
    )


def test_a_candidate_that_changes_its_mind_about_everything_is_refused(counts, champion):
    new, rules = evaluation(mended(counts, 0.3)), replace(QUICK, flips=0.3)

    assert judge(champion, new, rules, canaries([500, 1000])).verdict == "refuse"
    assert judge(champion, new, rules, canaries([500, 100])).verdict == "promote"
    row = reason(judge(champion, new, QUICK, canaries([500, 1000])), "flipped canary pixels")
    assert (row.value, row.ok) == (0.375, None)  # without a limit it is only told
    with pytest.raises(RunRefused, match="needs a table of canaries"):
        judge(champion, new, rules)
    with pytest.raises(RunRefused, match="cannot have changed"):
        judge(champion, new, rules, canaries([5000, 0]))


def test_few_images_decide_nothing(counts):
    old, new = evaluation(counts[:29]), evaluation(mended(counts[:29], 0.5))
    decision = judge(old, new, QUICK)

    assert decision.verdict == "undecided"
    assert reason(decision, "images").ok is None
    assert judge(old, new, replace(QUICK, images=29)).verdict == "promote"


# -- the first champion --------------------------------------------------------------------------


def test_where_there_is_no_champion_the_absolute_floors_decide(counts, champion):
    named = described(champion, "b" * 64, "e" * 64, ["road", "sky", "car", "person"])
    miou = judge(None, champion).candidate_miou

    assert judge(None, named).verdict == "promote"
    assert judge(None, named, Rules(least_miou=miou)).verdict == "promote"
    assert judge(None, named, Rules(least_miou=miou + 0.001)).verdict == "refuse"
    assert judge(None, named, Rules(least_iou={"person": 0.3})).verdict == "promote"
    refused = judge(None, named, Rules(least_iou={"person": 0.99}))
    assert refused.verdict == "refuse"
    assert reason(refused, "class person at least").ok is False
    with pytest.raises(RunRefused, match=r"no class 'persons' \(road, sky, car, person\)"):
        judge(None, named, Rules(least_iou={"persons": 0.3}))


def test_absolute_floors_hold_against_a_champion_too(counts, champion):
    better = evaluation(mended(counts, 0.3))

    assert judge(champion, better, replace(QUICK, least_miou=0.99)).verdict == "refuse"


# -- what cannot be compared ---------------------------------------------------------------------


def test_other_images_are_refused_by_name(champion):
    with pytest.raises(RunRefused, match=r"only one of them on 00000.png, 00001.png"):
        judge(champion, champion.slice(2), QUICK)
    with pytest.raises(RunRefused, match=r"00004.png and 95 more"):
        judge(champion, champion.slice(100), QUICK)


def test_other_labels_of_the_same_images_are_refused(counts, champion):
    other = counts.copy()
    other[7, 0, 0] += 1
    with pytest.raises(RunRefused, match=r"00007.png has another label or stratum"):
        judge(champion, evaluation(other), QUICK)
    with pytest.raises(RunRefused, match=r"00000.png has another label or stratum"):
        judge(champion, evaluation(counts, ["day"] * IMAGES), QUICK)


def test_other_classes_are_refused(champion):
    with pytest.raises(RunRefused, match="different classes"):
        judge(champion, evaluation(confusion(labels(IMAGES, classes=5), 0.8, 0)), QUICK)
    one, other = (described(champion, "", "", names) for names in ("abcd", "abce"))
    with pytest.raises(RunRefused, match=r"different classes \(a, b, c, d; a, b, c, e\)"):
        judge(one, other, QUICK)


def without(table, name):
    return table.drop_columns([name])


def changed(table, name, row, value):
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(
        table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type)
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: without(t, "answered"), "has no column answered"),
        (lambda t: t.slice(0, 0), "has no rows"),
        (lambda t: pa.concat_tables([t, t.slice(3, 1)]), "has 00003.png twice"),
        (lambda t: changed(t, "intersection", 2, [9999, 0, 0, 0]), "00002.png shares more pixels"),
        (lambda t: changed(t, "intersection", 3, [-1, 0, 0, 0]), "00003.png shares more pixels"),
        (lambda t: changed(t, "labelled", 2, [1, 2]), "labelled must hold as many numbers"),
        (lambda t: changed(t, "labelled", 2, [1, 2, None, 4]), "labelled must hold as many"),
        (lambda t: changed(t, "labelled", 2, None), "cannot be used: .*null"),
        (lambda t: changed(t, "key", 2, None), "cannot be used: .*'key'"),
        (lambda t: t.set_column(0, "key", t["labelled"]), "cannot be used: .*list"),
        (lambda t: described(t, "", "", ["a", "b"]), "counts 4 classes and names a, b"),
        (lambda t: described(t, "", "", ["a", "a", "b", "c"]), "counts 4 classes and names a, a"),
    ],
)
def test_a_table_that_cannot_be_is_refused_with_what_is_wrong(champion, damage, said):
    with pytest.raises(RunRefused, match=f"the evaluation of the candidate.*{said}"):
        judge(champion, damage(champion), QUICK)


def test_images_without_labels_are_refused_only_if_all_are():
    blank = labels(40)
    blank[:5] = 0
    counts = confusion(blank, 0.8, 0)
    assert judge(evaluation(counts), evaluation(mended(counts, 0.3)), QUICK).verdict == "promote"

    with pytest.raises(RunRefused, match="no pixel is labelled"):
        judge(None, evaluation(np.zeros((40, 4, 4), np.int64)), QUICK)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"confidence": 1.0}, "--rules.confidence 1.0 must be above 0.5 and below 1"),
        ({"resamples": 10}, "--rules.resamples 10 must be 100 or more"),
        ({"part_images": 1}, "--rules.part-images 1 must be 2 or more"),
        ({"class_floor": -0.1}, "--rules.class-floor -0.1 must be 0 or more"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, said):
    with pytest.raises(RunRefused, match=said):
        Rules(**rules)


# -- what is left to read ------------------------------------------------------------------------


def test_the_images_that_changed_most_are_named_worst_or_best_first(counts, champion):
    new = counts.copy()
    for image, share in ((10, -0.9), (20, 0.8), (30, -0.2)):
        new[image] = mended(counts[image : image + 1], share)[0]
    decision = judge(champion, evaluation(new), QUICK)

    assert [image.key for image in decision.changed] == ["00010.png", "00020.png", "00030.png"]
    first = decision.changed[0]
    assert first.difference == pytest.approx(first.candidate - first.champion)
    assert first.difference < -0.5


def test_the_record_says_all_to_programs_and_fits_on_a_page_for_people(counts, champion):
    strata = [f"clip {n // 4}" for n in range(IMAGES)]
    old, new = evaluation(counts, strata), evaluation(spoiled_class(counts, 2, 0.2), strata)
    decision = judge(old, new, QUICK)
    page, text = decision_record(
        decision, {"candidate": "cells/v0002@/r", "champion": "cells/v0001@/r", "reason": None}
    )
    told = json.loads(text)

    assert told["verdict"] == "refuse"
    assert told["candidate"] == "cells/v0002@/r"
    assert told["rules"]["margin"] == QUICK.margin
    assert len(told["reasons"]) == len(decision.reasons) > 50
    lines = page.decode().splitlines()
    assert lines[0] == "# refuse"
    assert "- candidate: cells/v0002@/r" in lines
    assert len(lines) < 90
    rows = [line for line in lines if line.startswith(("| ok", "| broken", "| open"))]
    assert rows[0].startswith("| broken | class 2 |")
    assert f"{len(decision.reasons) - len(rows)} more are in decision.json" in page.decode()


def test_a_hostile_key_stays_in_its_cell(counts, champion):
    hostile = "a|b`<img src=x>\n# promote"
    new = evaluation(mended(counts, 0.3))
    old, new = (changed(table, "key", 5, hostile) for table in (champion, new))
    page, text = decision_record(judge(old, new, QUICK), {})

    assert "<img" not in page.decode()
    assert page.decode().count("# promote") == 1
    assert hostile in {image["key"] for image in json.loads(text)["changed"]} | {hostile}


def test_a_table_says_of_which_model_and_set_it_is(champion):
    told = described(champion, "b" * 64, "e" * 64, ["a", "b", "c", "d"])

    assert description(told) == {
        "bundle": "b" * 64, "evalset": "e" * 64, "classes": ["a", "b", "c", "d"],
    }  # fmt: skip
    assert description(champion) == {}
