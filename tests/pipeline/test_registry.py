"""Versions never change, names move one at a time, and whoever dies in the middle harms nobody."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from models import Bundle, load_bundle
from pipeline.errors import RunRefused, StorageBusy
from pipeline.registry import (
    AliasMoved,
    Registry,
    RegistryDamaged,
    pinned,
    resolve,
    tables_for,
)
from pipeline.storage import LocalStore
from pipeline.versions import Origin, parse
from tests.archives import tree
from tests.bundles import files_of
from tests.cards import bundle
from tests.evaluations import model

ORIGIN = Origin(
    training="training-1",
    data_sha256="d" * 64,
    recipe={"epochs": 3},
    metrics={"miou": 0.5, "iou": {"road": 0.75}},
)


@pytest.fixture
def registry(tmp_path):
    return Registry.found(LocalStore(tmp_path / "registry"))


def publish(registry, seed=0, name="cells"):
    return registry.publish(name, bundle(seed), Origin(training=f"training-{seed}"))


def champions(registry, *seeds):
    """Versions that became champion one after the other."""
    versions = [publish(registry, seed) for seed in seeds]
    for version in versions:
        registry.move("champion", version, registry.current("champion"), f"{version.path} is best")
    return versions


def content(registry):
    root = registry.store.root
    return {path: (root / path).read_bytes() for path in tree(root)}


# -- versions ------------------------------------------------------------------------------------


def test_a_version_says_where_it_comes_from_and_is_a_bundle(registry, tiny_bundle):
    files = files_of(tiny_bundle)
    version = registry.publish("cells", files, replace(ORIGIN, parent="cells/v0003"))

    assert version.path == "cells/v0001"
    assert version.sha256 == Bundle.from_json(files[0]).sha256
    assert (version.training, version.parent) == ("training-1", "cells/v0003")
    assert (version.data_sha256, version.recipe) == ("d" * 64, {"epochs": 3})
    assert version.metrics == {"miou": 0.5, "iou": {"road": 0.75}}
    assert set(version.code) == {"maskfleet", "commit"}
    assert registry.version("cells", 1) == version
    assert registry.versions() == [version]
    loaded, card = load_bundle(version.uri)
    assert card.sha256 == version.sha256
    assert not loaded.training


def test_the_claim_is_frozen(registry):
    publish(registry)
    claim = json.loads(registry.store.read("cells/v0001/version.json"))

    assert set(claim) == {
        "format_version", "name", "bundle_sha256", "token", "created", "code", "training",
        "parent", "data_sha256", "recipe", "metrics",
    }  # fmt: skip
    assert tree(registry.store.root) == {
        "registry.json", "cells/v0001/version.json", "cells/v0001/weights.safetensors",
        "cells/v0001/model.json",
    }  # fmt: skip


def test_numbers_go_on_and_every_name_has_its_own(registry):
    assert [publish(registry, seed).number for seed in range(3)] == [1, 2, 3]
    assert publish(registry, 7, "street").path == "street/v0001"
    assert [v.path for v in registry.versions()] == [
        "cells/v0001", "cells/v0002", "cells/v0003", "street/v0001",
    ]  # fmt: skip
    assert [v.path for v in registry.versions("street")] == ["street/v0001"]


def test_a_training_that_publishes_again_gets_its_version_and_writes_nothing(registry):
    first = publish(registry, 0)
    publish(registry, 1)
    before = content(registry)

    assert registry.publish("cells", bundle(0), Origin(training="training-0")) == first
    # Even with other bytes: it has its version.
    assert registry.publish("cells", bundle(9), Origin(training="training-0")) == first
    assert content(registry) == before


def test_versions_are_sorted_by_number_beyond_four_digits(registry):
    version = publish(registry)
    claim = registry.store.read("cells/v0001/version.json")
    for number in (9999, 10000):
        for part in ("weights.safetensors", "model.json"):
            data = registry.store.read(f"cells/v0001/{part}")
            registry.store.create(f"cells/v{number}/{part}", data)
        registry.store.create(f"cells/v{number}/version.json", claim)

    assert [v.number for v in registry.versions("cells")] == [1, 9999, 10000]
    assert publish(registry, 1).path == "cells/v10001"
    assert registry.meant("cells/v10000").sha256 == version.sha256


@pytest.mark.parametrize(
    "name",
    [
        "", "..", ".", "a/b", "../cells", "Cells", "a b", "a..b", "-a", "a-", "a\n", "aliases",
        "decisions", "é", "x" * 65, "a@b", "v1\x00",
    ],
)  # fmt: skip
def test_names_that_could_be_anything_else_are_refused(registry, name):
    before = content(registry)
    with pytest.raises(RunRefused, match="cannot be the name of a model"):
        registry.publish(name, bundle(), ORIGIN)
    version = publish(registry, 5, "fine")
    with pytest.raises(RunRefused, match="cannot be an alias"):
        registry.move(name, version, None, "")
    assert {p for p in content(registry) if not p.startswith("fine/")} == set(before)


def test_what_is_no_bundle_is_not_published(registry):
    card, weights = bundle()
    with pytest.raises(RunRefused, match="not of one bundle"):
        registry.publish("cells", (card, weights + b"!"), ORIGIN)
    with pytest.raises(RunRefused, match="not JSON"):
        registry.publish("cells", (b"{", weights), ORIGIN)
    with pytest.raises(RunRefused, match="id of its training"):
        Origin(training=" ")
    with pytest.raises(RunRefused, match=r"parent ../../x is not of the form"):
        Origin(training="t", parent="../../x")
    assert tree(registry.store.root) == {"registry.json"}


def test_a_version_that_was_tampered_with_is_not_used(registry):
    version = publish(registry)
    registry.store.replace("cells/v0001/model.json", bundle(1)[0])

    with pytest.raises(RegistryDamaged, match=r"cells/v0001/model.json is not what was published"):
        resolve(version.reference)

    registry.store.replace("cells/v0001/version.json", b"{}")
    with pytest.raises(RegistryDamaged, match=r"cells/v0001/version.json is damaged"):
        registry.versions()


# -- publishers that die, and race ---------------------------------------------------------------


class Dead(BaseException):
    """What a SIGKILL would be, if it could be raised."""


class Failing:
    """A store of which one call fails, done or undone, and every later one too."""

    def __init__(self, store, call, error, *, after):
        self.store, self.left, self.after, self.error = store, call, after, error
        self.uri = store.uri

    def __getattr__(self, name):
        def called(*arguments):
            self.left -= 1
            if self.left < 0 or (self.left == 0 and not self.after):
                raise self.error
            answer = getattr(self.store, name)(*arguments)
            answer = list(answer) if name == "list" else answer
            if self.left == 0:
                raise self.error
            return answer

        return called


def calls_of(act, store):
    """How many calls an undisturbed one makes."""
    counting = Failing(store, 10_000, Dead(), after=False)
    act(counting)
    return 10_000 - counting.left


FAULTS = pytest.mark.parametrize("after", [False, True], ids=["undone", "done"])
ENDS = pytest.mark.parametrize("error", [Dead(), StorageBusy("503")], ids=["killed", "busy"])


@FAULTS
@ENDS
def test_wherever_a_publication_ends_its_training_finishes_it_and_nobody_else_sees_it(
    tmp_path, after, error
):
    def act(store, seed=3):
        return Registry.found(store).publish("cells", bundle(seed), Origin(training=f"t{seed}"))

    begun = tmp_path / "count"
    act(LocalStore(begun), seed=1)
    count = calls_of(act, LocalStore(begun))
    assert count >= 8

    for call in range(1, count + 1):
        store = LocalStore(tmp_path / f"{call}")
        first = act(store, seed=1)
        with pytest.raises(type(error)):
            act(Failing(store, call, error, after=after))

        registry = Registry(store)
        seen = registry.versions()
        assert seen[0] == first
        whole = "cells/v0002/model.json" in tree(store.root)
        assert [v.path for v in seen[1:]] == (["cells/v0002"] if whole else [])
        claimed = "cells/v0002/version.json" in tree(store.root)

        other = act(store, seed=4)
        assert other.number == (3 if claimed else 2)
        mine = act(store)
        assert mine.number == (2 if claimed else 3)
        assert act(store) == mine
        assert len(registry.versions()) == 3
        assert store.read(f"{mine.path}/weights.safetensors") == bundle(3)[1]


@FAULTS
def test_wherever_the_founding_ends_the_next_one_founds_it(tmp_path, after):
    count = calls_of(Registry.found, LocalStore(tmp_path / "count"))
    assert count >= 6
    for call in range(1, count + 1):
        store = LocalStore(tmp_path / f"{call}")
        with pytest.raises(Dead):
            Registry.found(Failing(store, call, Dead(), after=after))
        assert publish(Registry.found(store)).number == 1


def test_a_training_that_was_repeated_in_part_takes_another_number(registry):
    store = registry.store
    with pytest.raises(Dead):  # after the claim
        Registry(Failing(store, 2, Dead(), after=True)).publish("cells", bundle(1), ORIGIN)
    assert "cells/v0001/version.json" in tree(store.root)

    again = registry.publish("cells", bundle(2), ORIGIN)

    assert again.path == "cells/v0002"
    assert registry.publish("cells", bundle(2), ORIGIN) == again
    assert [v.path for v in registry.versions()] == ["cells/v0002"]
    with pytest.raises(RunRefused, match=r"there is no cells/v0001 .* newest are cells/v0002"):
        registry.meant("cells/v0001")


def at_once(count, act):
    together = threading.Barrier(count)

    def one(n):
        together.wait()
        return act(n)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_of_eight_trainings_that_publish_at_once_each_gets_a_number_of_its_own(tmp_path):
    def act(n):
        return publish(Registry.found(LocalStore(tmp_path / "r")), n)

    versions = at_once(8, act)

    assert sorted(v.number for v in versions) == list(range(1, 9))
    registry = Registry.open(LocalStore(tmp_path / "r"))
    assert registry.versions() == sorted(versions, key=lambda v: v.number)
    for version in versions:
        seed = int(version.training.removeprefix("training-"))
        assert registry.store.read(f"{version.path}/weights.safetensors") == bundle(seed)[1]


def test_one_training_that_publishes_eight_times_at_once_gets_one_version(tmp_path):
    def act(n):
        return Registry.found(LocalStore(tmp_path / "r")).publish("cells", bundle(), ORIGIN)

    versions = at_once(8, act)

    assert versions == [versions[0]] * 8
    assert len(tree(tmp_path / "r")) == 4


# -- aliases -------------------------------------------------------------------------------------


def test_an_alias_means_the_newest_entry_and_keeps_its_history(registry):
    one, two = champions(registry, 0, 1)
    history = registry.history("champion")

    assert registry.meant("champion") == two
    assert resolve(f"champion@{registry.store.uri}") == two
    assert [(e.number, e.version, e.previous) for e in history] == [
        (1, one.path, None),
        (2, two.path, one.path),
    ]
    assert history[1].sha256 == two.sha256
    assert registry.aliases() == {"champion": history[1]}
    entry = json.loads(registry.store.read("aliases/champion/000002.json"))
    assert set(entry) == {*asdict(history[1]), "format_version", "token"}


def test_of_eight_who_move_an_alias_at_once_one_wins_and_the_others_are_told(registry):
    versions = champions(registry, *range(9))
    seen = registry.current("champion")

    def act(n):
        try:
            return registry.move("champion", versions[n], seen, f"by {n}")
        except AliasMoved as error:
            return error

    ends = at_once(8, act)
    (winner,) = (end for end in ends if not isinstance(end, AliasMoved))

    assert registry.current("champion") == winner
    assert len(registry.history("champion")) == 10
    for end in ends:
        if isinstance(end, AliasMoved):
            assert "since a moment ago, not cells/v0009" in str(end)
            assert "run the same command again" in str(end)


def test_whoever_has_not_seen_the_present_meaning_moves_nothing(registry):
    one, _ = champions(registry, 0, 1)
    stale = registry.history("champion")[0]
    before = content(registry)

    for seen in (None, stale):
        with pytest.raises(AliasMoved, match=r"champion means cells/v0002 since"):
            registry.move("champion", one, seen, "late")
    assert content(registry) == before


@FAULTS
@ENDS
def test_wherever_a_move_ends_the_alias_means_one_or_the_other(tmp_path, after, error):
    def act(store):
        registry = Registry.open(store)
        seen = registry.current("champion")
        return registry.move("champion", registry.meant("cells/v0002"), seen, "better")

    def prepared(name):
        registry = Registry.found(LocalStore(tmp_path / name))
        champions(registry, 0)
        publish(registry, 1)
        return registry

    count = calls_of(act, prepared("count").store)
    assert count >= 5
    for call in range(1, count + 1):
        registry = prepared(f"{call}")
        with pytest.raises(type(error)):
            act(Failing(registry.store, call, error, after=after))
        moved = call == count and after
        assert registry.meant("champion").number == (2 if moved else 1)
        assert len(registry.history("champion")) == (2 if moved else 1)


def test_going_back_appends_and_goes_back_twice(registry):
    one, two, three = champions(registry, 0, 1, 2)

    assert registry.rollback("champion", "it sees ghosts").version == two.path
    assert registry.rollback("champion", "that too").version == one.path
    with pytest.raises(RunRefused, match="there is nothing before it"):
        registry.rollback("champion", "")
    assert registry.rollback("champion", "it was fine", three.path).version == three.path

    history = registry.history("champion")
    assert [e.version for e in history] == [v.path for v in (one, two, three, two, one, three)]
    assert history[3].reason == "it sees ghosts"
    assert [e.previous for e in history[3:]] == [three.path, two.path, one.path]
    assert registry.meant("champion") == three
    assert registry.rollback("champion", "").version == one.path


def test_going_back_goes_where_the_alias_has_been_only(registry):
    champions(registry, 0)
    publish(registry, 1)
    with pytest.raises(RunRefused, match="has meant cells/v0001 only"):
        registry.rollback("champion", "")
    with pytest.raises(RunRefused, match="has never meant cells/v0002; use `maskfleet promote"):
        registry.rollback("champion", "", "cells/v0002")
    with pytest.raises(RunRefused, match="means cells/v0001 already"):
        registry.rollback("champion", "", "cells/v0001")
    with pytest.raises(RunRefused, match=r"mine in .* means nothing yet"):
        registry.rollback("mine", "")


def test_an_alias_whose_version_was_replaced_is_not_used(registry):
    champions(registry, 0)
    claim = json.loads(registry.store.read("cells/v0001/version.json"))
    card, weights = bundle(5)
    sha = Bundle.from_json(card).sha256
    for part, data in (
        ("model.json", card),
        ("weights.safetensors", weights),
        ("version.json", json.dumps({**claim, "bundle_sha256": sha}).encode()),
    ):
        registry.store.replace(f"cells/v0001/{part}", data)

    assert registry.meant("cells/v0001").sha256 == sha
    with pytest.raises(RegistryDamaged, match="not the bundle that champion was given to"):
        registry.meant("champion")


# -- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what", "registry"),
    [
        ("champion@s3://bucket/models", "champion", "s3://bucket/models"),
        ("cells/v0007@s3://bucket/models/", "cells/v0007", "s3://bucket/models"),
        ("a.b-c_d/v12345@/models", "a.b-c_d/v12345", "/models"),
        ("champion@/data/user@host/models", "champion", "/data/user@host/models"),
    ],
)
def test_a_reference_names_what_and_where(text, what, registry):
    found = parse(text)
    assert (found.what, found.registry) == (what, registry)


@pytest.mark.parametrize(
    "text",
    [
        "demo", "model.onnx", "/models/cells", "s3://bucket/x", "champion@", "@/models",
        "./champion@place", "../x@y", "/a/b@c", "cells/7@/r", "cells/v7@/r", "cells/v00007@/r",
        "cells/v0007/x@/r", "../v0007@/r", "Champion@/r", "aliases/v0001@/r", "a/b/v0001@/r",
        "cells/v\u0660\u0660\u0660\u0667@/r",
    ],
)  # fmt: skip
def test_everything_else_is_a_place_and_no_reference(text):
    assert parse(text) is None
    with pytest.raises(RunRefused, match="is no reference into a registry"):
        resolve(text)


def test_a_secret_in_a_reference_is_refused_and_not_repeated():
    for text in ("champion@s3://KEY:SEcrET@bucket/x", "champion@https://host/x?sig=SEcrET"):
        with pytest.raises(RunRefused) as refused:
            resolve(text)
        assert "SEcrET" not in str(refused.value)


def test_what_is_not_there_is_refused_with_what_is(registry, tmp_path):
    champions(registry, 0, 1)
    uri = registry.store.uri
    with pytest.raises(RunRefused, match=r"no alias best .*champion, cells/v0001, cells/v0002"):
        resolve(f"best@{uri}")
    with pytest.raises(RunRefused, match=r"no cells/v0009 .*cells/v0001, cells/v0002"):
        resolve(f"cells/v0009@{uri}")
    with pytest.raises(RunRefused, match=r"no sells/v0001 .*there is no version of sells"):
        resolve(f"sells/v0001@{uri}")
    with pytest.raises(RunRefused, match=r"holds no registry .*written ./name@"):
        resolve(f"champion@{tmp_path / 'nowhere'}")


def test_a_run_stays_with_the_version_it_began_with(registry):
    one, two = champions(registry, 0, 1)
    reference = f"champion@{registry.store.uri}"

    assert pinned(reference, None) == (two, None)
    assert pinned(reference, two.sha256) == (two, None)
    assert pinned(reference, one.sha256) == (one, two)
    # What champion has never meant is another model: that is not for a registry to excuse.
    assert pinned(reference, "0" * 64) == (two, None)
    assert pinned(two.reference, one.sha256) == (two, None)


# -- other places --------------------------------------------------------------------------------


def test_a_folder_of_somebody_else_is_not_made_a_registry(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunRefused, match=r"not empty .*thesis.tex.*choose an empty folder"):
        Registry.found(LocalStore(tmp_path))
    assert tree(tmp_path) == {"thesis.tex"}


def test_a_store_that_ignores_the_condition_is_refused(tmp_path):
    class Forgetful(LocalStore):
        def create(self, path, data):
            self.replace(path, data)
            return True

    with pytest.raises(RunRefused, match="If-None-Match"):
        Registry.found(Forgetful(tmp_path / "r"))


def test_a_registry_of_a_later_format_is_left_alone(registry):
    registry.store.replace("registry.json", b'{"format_version": 2}')
    with pytest.raises(RunRefused, match="format version 2, this Maskfleet reads 1"):
        Registry.open(registry.store)
    registry.store.replace("registry.json", b"[]")
    with pytest.raises(RegistryDamaged, match=r"registry.json is damaged"):
        Registry.open(registry.store)


# -- evaluations and decisions -------------------------------------------------------------------


def test_an_evaluation_lies_beside_its_version_and_the_first_one_stays(registry):
    version, table = publish(registry), model(5)
    with pytest.raises(RunRefused, match=r"not evaluated on e1; run `maskfleet evaluate"):
        tables_for(version, "e1")

    assert registry.keep_evaluation(version, "e1", table)
    assert not registry.keep_evaluation(version, "e1", model(6))
    assert tables_for(version, "e1").equals(table)
    assert registry.evaluations(version) == ["e1"]
    assert registry.versions() == [version]
    with pytest.raises(RunRefused, match="no hash of an evaluation set"):
        tables_for(version, "../v0002/model")


def test_decisions_are_numbered_even_if_eight_are_made_at_once(registry):
    def act(n):
        return registry.keep_decision(lambda folder: (b"page", f"{folder} {n}".encode()))

    assert sorted(at_once(8, act)) == [f"decisions/{n:06}" for n in range(1, 9)]
    for n in range(1, 9):
        text = registry.store.read(f"decisions/{n:06}/decision.json")
        assert text.startswith(b"decisions/%06d " % n)
