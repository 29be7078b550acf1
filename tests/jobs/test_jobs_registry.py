"""`maskfleet registry` and `maskfleet promote` in process: exit codes, words, what stays."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from jobs import promote as promoting
from jobs import registry as looking
from jobs import segment as segmenting
from pipeline.gate import beside, contest
from pipeline.promotion import CANARIES, Rules, described
from pipeline.registry import AliasMoved, Registry
from pipeline.storage import LocalStore
from pipeline.versions import Origin
from tests import archives
from tests.archives import tree
from tests.bundles import tiny_bundle as tiny_bundle_of
from tests.cards import CLASSES, bundle
from tests.evaluations import confusion, evaluation, labels, mended

SET, LATER = "e" * 64, "f" * 64
COUNTS = confusion(labels(60), recall=0.8, seed=0)
QUICK = ("--rules.resamples", "200")


@pytest.fixture
def registry(tmp_path):
    return Registry.found(LocalStore(tmp_path / "registry"))


@pytest.fixture
def uri(registry):
    return registry.store.uri


def scored(counts, version, evalset=SET):
    return described(evaluation(counts), version.sha256, evalset, CLASSES)


def published(registry, seed, share=None, evalset=SET):
    """A version whose evaluation has this share of the first one's errors mended."""
    origin = Origin(training=f"t{seed}", recipe={"lr": seed}, metrics={"miou": 0.5 + seed / 10})
    version = registry.publish("cells", bundle(seed), origin)
    if share is not None:
        table = scored(mended(COUNTS, share), version, evalset)
        registry.keep_evaluation(version, evalset, table)
    return version


@pytest.fixture
def champion(registry):
    version = published(registry, 0, 0.0)
    registry.move("champion", version, None, "the first")
    return version


def call(capsys, command, *words):
    try:
        code = command.main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return SimpleNamespace(code=code, out=said.out, err=said.err)


@pytest.fixture
def promote(capsys):
    return lambda *words: call(capsys, promoting, *words, *QUICK)


@pytest.fixture
def look(capsys):
    return lambda *words: call(capsys, looking, *words)


# -- promote: how it ends ------------------------------------------------------------------------


def test_0_a_truly_better_candidate_is_champion_now(registry, uri, champion, promote):
    better = published(registry, 1, 0.3)

    told = promote(f"cells/v0002@{uri}")

    assert told.code == 0
    assert told.out.startswith("cells/v0002 against cells/v0001: promote\n")
    assert "champion is cells/v0002 now, proven" in told.out
    assert f"undo: maskfleet registry rollback {uri} champion" in told.out
    entry = registry.current("champion")
    assert (entry.version, entry.forced, entry.previous) == (better.path, False, champion.path)
    assert entry.decision == "decisions/000001"
    assert "mIoU 0." in entry.reason
    record = json.loads(registry.store.read("decisions/000001/decision.json"))
    assert (record["verdict"], record["forced"]) == ("promote", False)
    assert record["candidate"] == better.reference
    assert (record["champion_sha256"], record["evalset"]) == (champion.sha256, SET)
    assert registry.store.read("decisions/000001/decision.md").startswith(b"# promote\n")


def test_5_a_damaged_candidate_is_refused_and_the_reasons_are_kept(
    registry, uri, champion, promote
):
    published(registry, 1, -0.3)

    told = promote(f"cells/v0002@{uri}")

    assert told.code == 5
    assert told.out.startswith("cells/v0002 against cells/v0001: refuse\n")
    assert "broken  mIoU" in told.out
    assert "broken  class road" in told.out
    assert f"written down in {uri}/decisions/000001/decision.md" in told.out
    assert registry.meant("champion") == champion
    assert len(registry.history("champion")) == 1


def test_6_a_lucky_candidate_changes_nothing(registry, uri, champion, promote):
    lucky = published(registry, 1)
    counts = COUNTS.copy()
    counts[:2] = mended(counts[:2], 0.9)
    registry.keep_evaluation(lucky, SET, scored(counts, lucky))

    told = promote(f"cells/v0002@{uri}")

    assert told.code == 6
    assert "undecided" in told.out
    assert "images that changed most:\n  0000" in told.out
    assert registry.meant("champion") == champion


def test_0_the_first_champion_needs_the_absolute_floors_only(registry, uri, promote):
    published(registry, 0, 0.0)
    told = promote(f"cells/v0001@{uri}", "--rules.least-iou", "person", "0.99")
    assert (told.code, registry.current("champion")) == (5, None)

    told = promote(f"cells/v0001@{uri}", "--rules.least-miou", "0.5")

    assert told.code == 0
    assert told.out.startswith("cells/v0001 the first: promote\n")
    assert "undo" not in told.out
    assert registry.current("champion").reason == "the first"


def test_0_what_is_champion_already_stays_it_and_nothing_is_written(
    registry, uri, champion, promote
):
    before = tree(registry.store.root)

    told = promote(f"cells/v0001@{uri}")

    assert (told.code, told.out) == (0, "cells/v0001 is champion already\n")
    assert tree(registry.store.root) == before


def test_2_without_evidence_nothing_is_decided(registry, uri, champion, promote):
    published(registry, 1)
    told = promote(f"cells/v0002@{uri}")

    assert told.code == 2
    assert "refused: there is no evidence; run `maskfleet evaluate`" in told.err
    assert "Traceback" not in told.err
    assert registry.meant("champion") == champion


def test_2_what_cannot_be_meant(registry, uri, champion, promote, tmp_path):
    for words, said in (
        (("cells/v0002",), "give the candidate as candidate@REGISTRY"),
        ((f"cells/v0002@{uri}",), "there is no cells/v0002"),
        ((f"candidate@{uri}",), "there is no alias candidate"),
        ((f"champion@{tmp_path}",), "holds no registry"),
        ((f"champion@{uri}", "--force"), "--force overrules the evidence and needs a --reason"),
        ((f"champion@{uri}", "--champion-table", "x"), "--champion-table needs --candidate-table"),
        (
            (f"champion@{uri}", "--rules.confidence", "2"),
            "--rules.confidence 2.0 must be above 0.5",
        ),
    ):
        told = promote(*words)
        assert told.code == 2
        assert said in told.err


def test_4_of_two_promotions_at_once_one_wins_and_the_other_has_to_look_again(registry, champion):
    candidates = [published(registry, seed, 0.2 + seed / 100).path for seed in (1, 2, 3, 4)]
    met = threading.Barrier(4)  # all have seen the same champion and found their evidence

    def waiting(look):
        def looked(champion, candidate):
            met.wait()
            return look(champion, candidate)

        return looked

    def act(candidate):
        try:
            there = Registry.open(LocalStore(registry.store.root))
            return contest(there, candidate, waiting(beside(there)), Rules(resamples=200))
        except AliasMoved as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(act, candidates))

    (winner,) = (end for end in ends if not isinstance(end, AliasMoved))
    assert registry.current("champion") == winner.entry
    assert len(registry.history("champion")) == 2
    losers = [str(end) for end in ends if isinstance(end, AliasMoved)]
    assert len(losers) == 3
    assert all(f"champion means {winner.candidate.path} since" in loser for loser in losers)
    # Every decision is written down; the alias says which one counted.
    decisions = [path for path in tree(registry.store.root) if path.endswith("decision.json")]
    assert len(decisions) == 4
    assert f"{winner.entry.decision}/decision.json" in decisions


def test_4_is_how_a_lost_race_ends(registry, uri, champion, promote, monkeypatch):
    published(registry, 1, 0.3)
    rival = published(registry, 2, 0.4)
    decide = Registry.keep_decision

    def overtaken(self, record):
        folder = decide(self, record)
        registry.move("champion", rival, registry.current("champion"), "faster")
        return folder

    monkeypatch.setattr(Registry, "keep_decision", overtaken)
    told = promote(f"cells/v0002@{uri}")

    assert told.code == 4
    assert "not finished: champion means cells/v0003 since a moment ago" in told.err
    assert registry.meant("champion") == rival


# -- promote: what it is told --------------------------------------------------------------------


def test_force_overrules_and_says_so_for_ever(registry, uri, champion, promote):
    published(registry, 1, -0.3)

    told = promote(f"cells/v0002@{uri}", "--force", "--reason", "the camera is broken")

    assert told.code == 0
    assert "cells/v0002 against cells/v0001: refuse" in told.out
    assert "champion is cells/v0002 now, forced (the camera is broken)" in told.out
    entry = registry.current("champion")
    assert (entry.forced, entry.reason) == (True, "the camera is broken")
    record = json.loads(registry.store.read(f"{entry.decision}/decision.json"))
    assert (record["verdict"], record["forced"]) == ("refuse", True)


def test_force_needs_no_evidence(registry, uri, champion, promote):
    published(registry, 1)
    told = promote(f"cells/v0002@{uri}", "--force", "--reason", "trust me")

    assert told.code == 0
    assert "cells/v0002 against cells/v0001: no evidence" in told.out
    entry = registry.current("champion")
    assert (entry.forced, entry.decision) == (True, None)


def test_tables_may_come_from_files(registry, uri, champion, promote, tmp_path):
    better = published(registry, 1)
    files = {"old": scored(COUNTS, champion), "new": scored(mended(COUNTS, 0.3), better)}
    for name, table in files.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    canaries = {"key": ["a"], "changed": [300], "pixels": [1000]}
    pq.write_table(CANARIES.empty_table().from_pydict(canaries, CANARIES), tmp_path / "flips")
    given = (
        f"cells/v0002@{uri}", "--champion-table", tmp_path / "old.parquet",
        "--candidate-table", tmp_path / "new.parquet", "--canaries", tmp_path / "flips",
    )  # fmt: skip

    told = promote(*given, "--rules.flips", "0.2")
    assert told.code == 5
    assert "broken  flipped canary pixels  0.3" in told.out

    assert promote(*given, "--rules.flips", "0.4").code == 0


def test_2_tables_of_other_models_or_sets(registry, uri, champion, promote, tmp_path):
    better = published(registry, 1)
    old, new = tmp_path / "old", tmp_path / "new"
    given = (f"cells/v0002@{uri}", "--champion-table", old, "--candidate-table", new)
    for tables, said in (
        ((scored(COUNTS, better), scored(COUNTS, better)), "that is the evaluation of bundle"),
        ((scored(COUNTS, champion), scored(COUNTS, better, LATER)), "of different sets"),
        ((scored(COUNTS, champion), scored(COUNTS[1:], better)), "different images"),
    ):
        for path, table in zip((old, new), tables, strict=True):
            pq.write_table(table, path)
        told = promote(*given)
        assert told.code == 2
        assert said in told.err
    old.write_bytes(b"text")
    assert "not a readable Parquet table" in promote(*given).err
    old.unlink()
    assert promote(*given).code == 2
    told = promote(f"cells/v0002@{uri}", "--candidate-table", new)
    assert "there is a champion, cells/v0001" in told.err
    assert not (registry.store.root / "decisions").exists()


def test_with_several_evaluation_sets_one_has_to_be_chosen(registry, uri, champion, promote):
    better = published(registry, 1, 0.3)
    for version, share in ((champion, 0.0), (better, -0.3)):
        table = scored(mended(COUNTS, share), version, LATER)
        registry.keep_evaluation(version, LATER, table)

    told = promote(f"cells/v0002@{uri}")
    assert told.code == 2
    assert f"choose one with --evalset: {SET}, {LATER}" in told.err

    assert promote(f"cells/v0002@{uri}", "--evalset", LATER).code == 5
    assert promote(f"cells/v0002@{uri}", "--evalset", SET).code == 0


def test_an_alias_of_ones_own_passes_the_same_gate(registry, uri, champion, promote):
    published(registry, 1, 0.3)
    assert promote(f"champion@{uri}", "--alias", "staging").code == 0

    assert promote(f"cells/v0002@{uri}", "--alias", "staging").code == 0

    assert registry.meant("staging").path == "cells/v0002"
    assert registry.meant("champion") == champion
    assert promote(f"cells/v0002@{uri}", "--alias", "../x").code == 2


def test_the_json_of_promote_has_frozen_keys(registry, uri, champion, promote):
    published(registry, 1, 0.3)
    told = promote(f"cells/v0002@{uri}", "--json")
    said = json.loads(told.out)

    assert set(said) == {"candidate", "champion", "decision", "folder", "entry"}
    assert set(said["decision"]) == {
        "verdict", "reasons", "changed", "images", "champion_miou", "candidate_miou",
        "probability", "rules",
    }  # fmt: skip
    assert set(said["decision"]["reasons"][0]) == {
        "name", "value", "limit", "ok", "low", "high", "note",
    }  # fmt: skip
    assert said["entry"]["version"] == said["candidate"]["name"] + "/v0002"


# -- registry ------------------------------------------------------------------------------------


def test_list_names_every_version_and_what_it_is_called(registry, uri, champion, look):
    published(registry, 1)
    told = look("list", uri)

    assert told.code == 0
    head, first, second = told.out.splitlines()
    assert head.split() == ["version", "created", "mIoU", "bundle", "parent", "aliases"]
    assert first.split()[0] == "cells/v0001"
    assert first.split()[2:] == ["0.5000", champion.sha256[:12], "champion"]
    assert second.split()[0] == "cells/v0002"
    said = json.loads(look("list", uri, "--json").out)
    assert [v["number"] for v in said["versions"]] == [1, 2]
    assert said["aliases"]["champion"]["version"] == "cells/v0001"


def test_show_says_all_of_one(registry, uri, champion, look):
    told = look("show", uri)

    assert told.code == 0
    lines = dict(line.split(None, 1) for line in told.out.splitlines() if " " in line)
    assert lines["reference"] == champion.reference
    assert lines["architecture"] == "latent_attention"
    assert lines["classes"] == ", ".join(CLASSES)
    assert lines["metrics.miou"] == "0.5"
    assert lines["evaluations"] == SET
    assert json.loads(look("show", uri, "cells/v0001", "--json").out)["aliases"] == ["champion"]
    assert look("show", uri, "best").code == 2


def test_compare_sets_two_side_by_side_and_on_the_same_images(registry, uri, champion, look):
    published(registry, 1, 0.3)
    told = look("compare", uri, "champion", "cells/v0002")

    assert told.code == 0
    lines = [line.split() for line in told.out.splitlines()]
    assert lines[0] == ["cells/v0001", "cells/v0002"]
    assert ["metrics.miou", "0.5", "0.6"] in lines
    assert ["recipe.lr", "0", "1"] in lines
    assert f"on 60 images of {SET[:12]}:" in told.out
    assert "better in 100.0% of the resamples" in told.out
    said = json.loads(look("compare", uri, "cells/v0002", "champion", "--json").out)
    assert said["evaluations"][SET]["verdict"] == "refuse"


def test_rollback_is_one_command_and_history_tells(registry, uri, champion, look, promote):
    published(registry, 1, 0.3)
    assert promote(f"cells/v0002@{uri}").code == 0

    told = look("rollback", uri, "--reason", "it sees ghosts")

    assert (told.code, told.out) == (0, "champion is cells/v0001 again (it was cells/v0002)\n")
    assert registry.meant("champion") == champion
    lines = look("history", uri).out.splitlines()
    assert [line.split()[2] for line in lines] == ["cells/v0001", "cells/v0002", "cells/v0001"]
    assert "decisions/000001" in lines[1]
    assert lines[2].endswith("it sees ghosts")
    assert look("rollback", uri).code == 2
    assert look("rollback", uri, "--to", "cells/v0002").code == 0
    assert len(json.loads(look("history", uri, "champion", "--json").out)["entries"]) == 4
    assert "mine has never meant anything" in look("history", uri, "mine").out


def test_a_model_made_elsewhere_can_be_put_in_once(tmp_path, tiny_bundle, look):
    uri = tmp_path / "new"
    told = look("add", uri, "cells", tiny_bundle)

    assert told.code == 0
    assert told.out.startswith(f"cells/v0001@{uri} (")
    assert look("add", uri, "cells", tiny_bundle).out == told.out
    assert look("show", uri, "cells/v0001").code == 0
    assert look("add", uri, "../cells", tiny_bundle).code == 2
    assert look("add", uri, "cells", tmp_path / "nothing").code == 2


def test_a_place_without_a_registry_is_refused(tmp_path, look):
    for words in (("list",), ("show",), ("compare", "a", "b"), ("rollback",), ("history",)):
        told = look(words[0], tmp_path, *words[1:])
        assert told.code == 2
        assert "holds no registry" in told.err


@pytest.mark.parametrize("command", ["list", "show", "compare", "history", "rollback", "add"])
def test_every_subcommand_explains_itself(command, look):
    told = look(command, "--help")

    assert told.code == 0
    assert "registry" in told.out.lower()


# -- segment with what an alias means ------------------------------------------------------------


@pytest.fixture
def segment(tmp_path, capsys):
    archives.uniform(tmp_path / "in", 2)

    def called(reference, out="run"):
        words = (tmp_path / "in", "--out", tmp_path / out, "--model", reference)
        return call(capsys, segmenting, *words)

    return called


def pinned_in(run):
    told = json.loads((run / "run.json").read_text())["bundle"]
    return told["name"], told["sha256"]


def test_a_run_pins_the_version_an_alias_means_and_stays_with_it(
    tmp_path, tiny_bundle, look, segment
):
    uri, run = str(tmp_path / "registry"), tmp_path / "run"
    other = tiny_bundle_of(tmp_path / "other", seed=7)
    look("add", uri, "cells", tiny_bundle)
    look("add", uri, "cells", other)
    registry = Registry.open(LocalStore(tmp_path / "registry"))
    one, two = registry.versions()
    first = registry.move("champion", one, None, "the first")

    assert segment(f"champion@{uri}").code == 0
    assert pinned_in(run) == (f"cells/v0001@{uri}", one.sha256)

    registry.move("champion", two, first, "better")
    archives.filled(tmp_path / "in", {"new.png": archives.png(20, 20, 9)})
    told = segment(f"champion@{uri}")

    assert told.code == 0
    assert "this call: 1 images" in told.out
    (said,) = (line for line in told.err.splitlines() if line.startswith("champion@"))
    assert "means cells/v0002 by now; this run began with cells/v0001 and goes on with it" in said
    assert pinned_in(run) == (f"cells/v0001@{uri}", one.sha256)
    assert segment(one.reference).code == 0

    refused = segment(two.reference)
    assert refused.code == 2
    assert "a new model means a new run: choose another --out" in refused.err
    assert segment(f"champion@{uri}", "again").code == 0
    assert pinned_in(tmp_path / "again") == (f"cells/v0002@{uri}", two.sha256)


def test_2_a_model_that_no_registry_has(tmp_path, uri, champion, segment):
    for reference, said in (
        (f"best@{uri}", "there is no alias best"),
        (f"cells/v0009@{uri}", "there is no cells/v0009"),
        (f"champion@{tmp_path / 'nowhere'}", "holds no registry"),
    ):
        told = segment(reference)
        assert told.code == 2
        assert said in told.err
    assert not (tmp_path / "run").exists()
