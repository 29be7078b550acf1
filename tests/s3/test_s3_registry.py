"""A registry in a bucket: one winner of every race, whatever the network does to the answers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import promote
from pipeline.create import read_bundle
from pipeline.errors import StorageBusy, StorageDenied
from pipeline.promotion import described
from pipeline.registry import AliasMoved, Registry, pinned, resolve, tables_for
from pipeline.storage import open_store, s3
from pipeline.versions import Origin
from tests import runs
from tests.bundles import files_of
from tests.cards import CLASSES, bundle
from tests.evaluations import confusion, evaluation, labels, mended

SET = "e" * 64


@pytest.fixture
def uri(bucket, monkeypatch) -> str:
    monkeypatch.setattr(s3, "_made", {})  # connect anew: this test's endpoint may be a proxy
    return f"s3://{bucket}/models/registry"


def published(uri, seed=0):
    origin = Origin(training=f"training-{seed}")
    return Registry.found(open_store(uri)).publish("cells", bundle(seed), origin)


def at_once(count, act):
    together = threading.Barrier(count)

    def one(n):
        together.wait()
        return act(n)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_of_eight_trainings_that_publish_at_once_each_gets_a_number_of_its_own(uri):
    versions = at_once(8, lambda n: published(uri, n))

    assert sorted(v.number for v in versions) == list(range(1, 9))
    for version in versions:
        assert resolve(version.reference) == version
        assert read_bundle(version.reference) == bundle(int(version.training[9:]))


def test_one_training_that_publishes_eight_times_at_once_gets_one_version(uri, s3_server, bucket):
    versions = at_once(8, lambda n: published(uri))

    assert versions == [versions[0]] * 8
    with s3_server.client() as client:
        found = client.list_objects_v2(Bucket=bucket)["Contents"]
    assert sorted(o["Key"].removeprefix("models/registry/") for o in found) == [
        "cells/v0001/model.json", "cells/v0001/version.json", "cells/v0001/weights.safetensors",
        "registry.json",
    ]  # fmt: skip


def test_of_eight_who_move_an_alias_at_once_one_wins_and_the_others_are_told(uri):
    versions = [published(uri, n) for n in range(8)]
    registry = Registry.open(open_store(uri))

    def act(n):
        try:
            return registry.move("champion", versions[n], None, f"by {n}")
        except AliasMoved as error:
            return error

    ends = at_once(8, act)
    (winner,) = (end for end in ends if not isinstance(end, AliasMoved))
    assert registry.history("champion") == [winner]
    assert resolve(f"champion@{uri}").path == winner.version


@pytest.mark.parametrize("fault", ["lost_answer", "duplicate", "503", "reset"])
def test_whatever_happens_to_the_requests_a_version_is_made_and_named_once(fault_proxy, uri, fault):
    # lost_answer: it has landed, the second try hears that it exists; duplicate: it arrives twice
    for path in ("*/version.json", "*/weights.safetensors", "*/model.json", "*/aliases/*"):
        fault_proxy.fault(fault, "PUT", path, times=1)
    first = published(uri)
    registry = Registry.open(open_store(uri))
    entry = registry.move("champion", first, None, "the first")

    assert fault_proxy.done[fault] == 4
    fault_proxy.clear()
    assert registry.versions() == [first]
    assert first.number == 1
    assert registry.history("champion") == [entry]


def test_a_publication_that_a_dead_network_ended_is_finished_later(fault_proxy, uri, monkeypatch):
    monkeypatch.setattr(s3, "RETRIES", 1)
    fault_proxy.fault("503", "PUT", "*/model.json")
    with pytest.raises(StorageBusy):
        published(uri)
    registry = Registry.open(open_store(uri))
    assert registry.versions() == []
    fault_proxy.clear()

    assert published(uri, seed=1).number == 2  # somebody else goes on meanwhile
    assert published(uri).number == 1


def test_a_reader_looks_everything_up_and_moves_nothing(s3_server, bucket, uri, monkeypatch):
    version = published(uri)
    registry = Registry.open(open_store(uri))
    entry = registry.move("champion", version, None, "the first")
    reader = s3_server.environment(s3_server.add_reader(bucket))
    for name, value in reader.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "_made", {})  # a connection with the new keys

    assert resolve(f"champion@{uri}") == version
    with pytest.raises(StorageDenied):
        registry.move("champion", version, entry, "again")


def test_a_run_pins_what_champion_means_and_a_promotion_changes_nothing_for_it(
    uri, archive, tiny_bundle, tmp_path, capsys
):
    registry = Registry.found(open_store(uri))
    one = registry.publish("cells", files_of(tiny_bundle), Origin(training="t1"))
    registry.move("champion", one, None, "the first")
    words = runs.words(archive, tmp_path / "run", f"champion@{uri}")
    runs.finished(words, tmp_path / "log")

    two = published(uri, 2)
    counts = confusion(labels(60), 0.8, 0)
    for version, share in ((one, 0.0), (two, 0.3)):
        table = evaluation(mended(counts, share))
        registry.keep_evaluation(version, SET, described(table, version.sha256, SET, CLASSES))
    assert tables_for(two, SET).num_rows == 60
    assert promote.main([f"{two.path}@{uri}"]) == 0
    assert "champion is cells/v0002 now, proven" in capsys.readouterr().out
    assert registry.store.read("decisions/000001/decision.md").startswith(b"# promote\n")

    assert pinned(f"champion@{uri}", one.sha256) == (one, two)
    runs.finished(words, tmp_path / "again")
    assert "this run began with cells/v0001" in (tmp_path / "again").read_text()
    registry.rollback("champion", "it sees ghosts")
    assert resolve(f"champion@{uri}") == one
