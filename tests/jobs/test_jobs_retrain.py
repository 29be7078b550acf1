"""`maskfleet retrain` in process: rounds while the labels grow, good labels and bad ones."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import retrain as retraining
from pipeline import gate
from pipeline.canaries import flips
from pipeline.errors import RunRefused
from pipeline.here import Here
from pipeline.reader import open_run
from pipeline.registry import Registry, tables_for
from pipeline.retrain import retrain
from pipeline.storage import LocalStore
from pipeline.versions import Origin
from tests import learning
from tests.archives import segment, tree, uniform
from tests.bundles import files_of

PICTURES, MORE = 30, 12
ONCE = ("--set", "length=1", "--set", "rate.warmup=0")
ROUND = (
    *("--name", "blobs", *learning.WORDS, *learning.LEARNS),
    *("--share", "0.4", "--rules.images", "5", "--rules.resamples", "200"),
)


def words(data, registry, *more) -> list[str]:
    return [str(word) for word in (data, "--out", registry, *ROUND, *more)]


def round_of(data, registry, *more):
    """`maskfleet retrain` without the command."""
    config = retraining.parsed(words(data, registry, *more))
    return retrain(config, Here(config.compute))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A round that nothing happened to, its labels and its registry."""
    folder = tmp_path_factory.mktemp("first")
    data, registry = learning.folder(folder / "data", PICTURES), folder / "registry"
    return SimpleNamespace(data=data, registry=registry, round=round_of(data, registry))


def copied(first, folder):
    """Labels and registry after the first round, to go on with."""
    data = shutil.copytree(first.data, folder / "data")
    registry = shutil.copytree(first.registry, folder / "registry")
    return SimpleNamespace(data=data, registry=registry)


@pytest.fixture
def after(first, tmp_path):
    return copied(first, tmp_path)


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    """The round after it, with more labels and with canaries."""
    folder = tmp_path_factory.mktemp("second")
    both = copied(first, folder)
    learning.add(both.data, range(PICTURES, PICTURES + MORE))
    canaries = uniform(folder / "canaries", 5)
    both.round = round_of(both.data, both.registry, "--canaries", canaries)
    return both


@pytest.fixture
def call(capsys):
    """Run the command; answers the exit code and what was said."""

    def called(*given):
        code = retraining.main(words(*given))
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return called


def opened(registry) -> Registry:
    return Registry.open(LocalStore(Path(registry)))


def learnt_from(registry, version) -> dict[str, str]:
    """Keys and roles of the pictures that a version's training knew of."""
    path = Path(registry) / "trainings" / version.training / "data.parquet"
    return {row["key"]: row["role"] for row in pq.read_table(path).to_pylist()}


def decided_on(registry, record) -> set[str]:
    version = opened(registry).meant(record["candidate"])
    return set(tables_for(version, record["evalset"])["key"].to_pylist())


def decision_of(registry, record) -> dict:
    return json.loads((Path(registry) / record["decision"] / "decision.json").read_text())


def calls(registry) -> list[Path]:
    """Folders of all calls that trained."""
    return sorted(Path(registry).glob("trainings/*/call-*"))


# -- the first round -----------------------------------------------------------------------------


def test_the_first_model_is_champion_and_the_round_is_written_down(first):
    record, registry = first.round.record, opened(first.registry)
    folder = Path(first.round.folder)

    assert (first.round.verdict, first.round.fresh) == ("promote", True)
    assert registry.meant("champion").path == record["candidate"] == "blobs/v0001"
    assert registry.meant("candidate").path == "blobs/v0001"
    assert json.loads((folder / "record.json").read_text()) == record
    assert set(record) == {
        "verdict", "when", "data", "labels_sha256", "pictures", "new", "new_by_stratum", "deciding",
        "evalset", "champion", "candidate", "decision", "promoted_as", "champion_miou",
        "candidate_miou", "metrics", "seconds", "deciding_learnt",
    }  # fmt: skip
    assert (record["pictures"], record["new"]) == (PICTURES, PICTURES)
    assert (record["champion"], record["champion_miou"], record["promoted_as"]) == (None, None, 1)
    assert record["candidate_miou"] > 0.6
    page = (folder / "record.md").read_text()
    assert page.startswith("# blobs/v0001 against nobody yet: promote\n")
    assert f"- decided on {record['deciding']} pictures that neither has learnt from" in page
    assert "undo:" not in page


def test_pictures_that_decide_are_never_learnt_from(first):
    version = opened(first.registry).meant("champion")
    roles = learnt_from(first.registry, version)
    deciding = decided_on(first.registry, first.round.record)

    assert len(deciding) == first.round.record["deciding"] > 5
    assert not deciding & set(roles)
    assert len(deciding) + len(roles) == PICTURES
    assert set(roles.values()) == {"learnt", "held out"}


def test_where_nothing_is_new_nothing_is_done(after, call):
    before = tree(after.registry)

    told = call(after.data, after.registry)

    assert told.code == 0
    assert told.out.startswith("nothing new: blobs/v0001 has learnt from these labels; see ")
    assert Path(told.out.split()[-1]).is_dir()
    assert tree(after.registry) == before


# -- rounds with more labels ---------------------------------------------------------------------


def test_the_second_round_goes_on_from_the_champion_and_decides(second):
    record, registry = second.round.record, opened(second.registry)
    candidate = registry.meant("blobs/v0002")

    assert second.round.fresh
    assert record["verdict"] in {"promote", "refuse", "undecided"}
    assert (record["champion"], record["candidate"]) == ("blobs/v0001", "blobs/v0002")
    assert candidate.parent == "blobs/v0001"
    promoted = record["verdict"] == "promote"
    assert registry.meant("champion").path == ("blobs/v0002" if promoted else "blobs/v0001")
    decision = decision_of(second.registry, record)
    assert decision["verdict"] == record["verdict"]
    assert decision["images"] == record["deciding"]
    assert decision["candidate_miou"] == record["candidate_miou"]
    for path in (registry.meant("blobs/v0001"), candidate):
        assert record["evalset"] in registry.evaluations(path)


def test_its_record_says_what_was_new_and_what_was_decided(second):
    record = second.round.record
    page = Path(second.round.folder, "record.md").read_text()

    assert (record["pictures"], record["new"]) == (PICTURES + MORE, MORE)
    assert record["new_by_stratum"] == {"": MORE}
    assert page.startswith(f"# blobs/v0002 against blobs/v0001: {record['verdict']}\n")
    assert f"{MORE} of them new or changed since blobs/v0001" in page
    assert f"## Decision: {record['verdict']}" in page
    assert "curves.png" in page


def test_what_decides_once_decides_always_as_the_labels_grow(first, second):
    before = decided_on(first.registry, first.round.record)
    now = decided_on(second.registry, second.round.record)

    assert before < now
    candidate = opened(second.registry).meant("blobs/v0002")
    assert not now & set(learnt_from(second.registry, candidate))


def test_canaries_say_how_many_pixels_change_their_class(second):
    folder = Path(second.round.folder) / "canaries"
    runs = [str(folder / name) for name in ("champion", "candidate")]
    old, new = (open_run(run) for run in runs)
    keys = old.images["key"].to_pylist()
    changed = [np.mean(old.mask(key) != new.mask(key)) for key in keys]

    (reason,) = (
        reason
        for reason in decision_of(second.registry, second.round.record)["reasons"]
        if reason["name"] == "flipped canary pixels"
    )

    assert len(keys) == 5
    assert reason["note"] == "5 pictures"
    assert reason["value"] == pytest.approx(np.mean(changed))
    assert flips(*runs)["pixels"].to_pylist() == [40 * 48] * 5


def test_runs_without_a_common_picture_cannot_be_compared(second, tmp_path, tiny_bundle):
    uniform(tmp_path / "in" / "others", 1)
    segment(tmp_path / "in", tmp_path / "run", tiny_bundle)

    with pytest.raises(RunRefused, match="no pictures in common"):
        flips(f"{second.round.folder}/canaries/champion", str(tmp_path / "run"))


def test_bad_labels_are_not_promoted_and_are_not_learnt_from_twice(after, call):
    champion = opened(after.registry).meant("champion")
    learnt = learnt_from(after.registry, champion)
    learning.add(after.data, [int(key[:4]) for key in learnt], shuffled=True)

    told = call(after.data, after.registry)
    again = call(after.data, after.registry)

    assert (told.code, again.code) == (0, 0)
    assert told.out.startswith("blobs/v0002 against blobs/v0001: refuse, ")
    assert f"written down in {after.registry}/retrainings/round-" in told.out
    assert again.out.splitlines()[0].endswith("(decided before; nothing was done)")
    assert opened(after.registry).meant("champion") == champion
    assert len(opened(after.registry).versions()) == 2
    assert len(calls(after.registry)) == 2
    assert len(list((after.registry / "decisions").iterdir())) == 2


def test_a_corrected_mask_is_news(after, call):
    champion = opened(after.registry).meant("champion")
    key = min(learnt_from(after.registry, champion))
    learning.add(after.data, [int(key[:4])], shuffled=True)

    told = call(after.data, after.registry, *ONCE, "--log", "json")

    said = json.loads(told.out)
    assert told.code == 0
    assert (said["fresh"], said["new"], said["pictures"]) == (True, 1, PICTURES)


def test_a_split_that_decides_is_never_learnt_from(tmp_path, call):
    data = learning.folder(tmp_path / "data", 12)
    keys = [f"{n:04}" for n in range(12)]
    lists = {"train": keys[:5], "val": keys[5:6], "test": keys[6:]}
    (data / "dataset.json").write_text(json.dumps({"splits": lists}))
    (data / "strata.json").write_text('{"000": "old", "": "young"}')

    told = call(data, tmp_path / "r", *ONCE, "--log", "json")

    said = json.loads(told.out)
    assert (told.code, said["verdict"], said["deciding"]) == (0, "promote", 6)
    assert decided_on(tmp_path / "r", said) == {f"{key}.png" for key in keys[6:]}
    assert said["new_by_stratum"] == {"old": 10, "young": 2}
    champion = opened(tmp_path / "r").meant("champion")
    assert learnt_from(tmp_path / "r", champion) == {
        f"{key}.png": "held out" if key == "0005" else "learnt" for key in keys[:6]
    }


# -- a round that is cut off, and two at a time --------------------------------------------------


def test_a_round_killed_before_its_decision_goes_on_without_training_again(first, tmp_path, call):
    registry = tmp_path / "r"
    learning.killed(
        retraining.main, words(first.data, registry), "link", "decisions/000001/decision.json"
    )
    assert len(calls(registry)) == 1
    assert opened(registry).current("champion") is None

    told = call(first.data, registry)

    assert told.code == 0
    assert told.out.startswith("blobs/v0001, the first: promote, ")
    assert len(calls(registry)) == 1
    versions = [opened(place).meant("champion") for place in (registry, first.registry)]
    assert versions[0].sha256 == versions[1].sha256


def test_a_round_killed_between_promotion_and_record_gets_its_record_by_the_next_call(
    first, tmp_path, call
):
    registry = tmp_path / "r"
    learning.killed(retraining.main, words(first.data, registry), "link", "record.json")
    assert opened(registry).current("champion") is not None

    told = call(first.data, registry)

    assert told.code == 0
    assert told.out.startswith("nothing new: blobs/v0001")
    (record,) = (registry / "retrainings").glob("*/record.json")
    said, whole = json.loads(record.read_text()), first.round.record
    assert {k: v for k, v in said.items() if k not in ("when", "seconds", "metrics", "data")} == {
        k: v for k, v in whole.items() if k not in ("when", "seconds", "metrics", "data")
    }
    assert "## Decision: promote" in record.with_name("record.md").read_text()


def test_4_of_two_rounds_at_a_time_one_promotes_and_the_other_is_told(
    after, call, monkeypatch, tiny_bundle
):
    registry = opened(after.registry)
    rival = registry.publish("blobs", files_of(tiny_bundle), Origin(training="rival"))
    learning.add(after.data, range(PICTURES, PICTURES + MORE))
    decide = Registry.keep_decision

    def overtaken(self, record):
        folder = decide(self, record)
        registry.move("champion", rival, registry.current("champion"), "faster")
        return folder

    monkeypatch.setattr(Registry, "keep_decision", overtaken)
    easy = ("--rules.margin", "-1", "--rules.class-floor", "1", "--rules.slowdown", "100")
    told = call(after.data, after.registry, *easy, "--rules.calibration", "1")

    assert told.code == 4
    assert "not finished: champion means blobs/v0002 since a moment ago" in told.err
    assert registry.meant("champion") == rival
    assert len(list((after.registry / "retrainings").glob("*/record.json"))) == 1


def test_4_the_same_round_begun_twice_promotes_once(first, tmp_path, call, monkeypatch):
    registry = tmp_path / "r"

    def overtaken(*arguments, **named):
        monkeypatch.setattr("pipeline.retrain.contest", gate.contest)
        assert round_of(first.data, registry, *ONCE).verdict == "promote"
        return gate.contest(*arguments, **named)

    monkeypatch.setattr("pipeline.retrain.contest", overtaken)
    told = call(first.data, registry, *ONCE)
    again = call(first.data, registry, *ONCE)

    assert told.code == 4
    assert "not finished: champion means blobs/v0001 since a moment ago" in told.err
    assert (again.code, again.out.split(":")[0]) == (0, "nothing new")
    assert len(opened(registry).history("champion")) == 1
    assert len(list((registry / "decisions").iterdir())) == 1


# -- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--share", "0.0001"), "0 pictures decide and 30 are learnt from; both need some"),
        (("--decide-on", "test"), "has no split 'test'; it has: all (30)"),
        (("--rules.flips", "0.1"), "--rules.flips 0.1 needs pictures: --canaries FOLDER"),
        (("--canaries", "nowhere"), "nowhere is not a folder"),
        (("--rules.least-iou", "cell", "0.5"), "there is no class 'cell' (background, nucleus)"),
        (("--model", "unet"), "no architecture"),
        (("--held-out", "zebra*"), "no split (all) and no key matches it"),
    ],
)
def test_2_what_cannot_be_done_is_refused_before_anything_is_spent(
    first, tmp_path, call, more, said
):
    told = call(first.data, tmp_path / "r", *more)

    assert told.code == 2
    assert told.err.startswith("refused: ")
    assert said in told.err
    assert not (tmp_path / "r" / "trainings").exists()
    assert not (tmp_path / "r" / "blobs").exists()


def test_2_the_first_round_must_be_told_a_model(first, tmp_path, capsys):
    given = [str(first.data), "--out", str(tmp_path / "r")]

    assert retraining.main(given) == 2
    assert "has no champion yet: say what the first one is trained from" in capsys.readouterr().err
