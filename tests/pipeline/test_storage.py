"""A folder as a store: one winner, whole objects, nothing foreign, and clear refusals."""

import errno
import os
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import RunRefused, StorageBusy, StorageDenied, StorageMissing
from pipeline.storage import (
    LocalStore,
    ObjectChanged,
    ObjectUnreadable,
    absolute,
    check_create_only,
    local,
    open_store,
)

SECRET = "wJalr/XUtn/FEMI"


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


def paths(store, prefix=""):
    return [found.path for found in store.list(prefix)]


# -- writing -------------------------------------------------------------------------------------


def test_of_sixteen_writers_one_wins_and_its_object_is_whole(store):
    contents = [bytes([i]) * 200_000 for i in range(16)]
    together = threading.Barrier(16)

    def write(content):
        together.wait()
        return store.create("a/b/object", content)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, contents))

    assert won.count(True) == 1
    assert store.read("a/b/object") == contents[won.index(True)]
    assert paths(store) == ["a/b/object"]
    assert list((store.root / "a/b").iterdir()) == [store.root / "a/b/object"]  # nothing temporary


def test_an_object_is_never_seen_half_written(store):
    contents = {bytes([i]) * 300_000 for i in range(20)}
    done = threading.Event()
    seen = set()

    def watch():
        while not done.is_set():
            try:
                seen.add(store.read("object"))
            except StorageMissing:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    for content in contents:
        store.replace("object", content)
    done.set()
    watcher.join()

    assert seen <= contents


def test_the_second_create_is_told_that_another_one_is_there(store):
    assert store.create("x", b"first")
    assert not store.create("x", b"second")
    assert store.read("x") == b"first"


def test_a_writer_that_tries_again_after_a_lost_answer_learns_that_it_won(store):
    assert store.create("x", b"mine")
    assert store.create("x", b"mine")


def test_replace_writes_over_and_delete_forgives(store):
    store.replace("x", b"1")
    store.replace("x", b"22")
    assert store.read("x") == b"22"

    store.delete("x")
    store.delete("x")
    assert store.stat("x") is None


def test_temporary_files_of_a_killed_writer_are_not_listed(store):
    store.create("x", b"1")
    (store.root / ".tmp-0123").write_bytes(b"half")

    assert paths(store) == ["x"]


def test_temporary_files_are_what_is_unfinished_until_they_are_deleted(store):
    store.create("a/x", b"1")
    for name in ("a/.tmp-0123", ".tmp-4567"):
        (store.root / name).write_bytes(b"half")

    assert sorted(found.path for found in store.unfinished()) == [".tmp-4567", "a/.tmp-0123"]
    store.delete("a/.tmp-0123")
    assert [(found.path, found.nbytes) for found in store.unfinished()] == [(".tmp-4567", 4)]
    assert list(LocalStore(store.root / "nowhere").unfinished()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the small file system")
def test_a_full_disk_is_said_to_be_full_and_leaves_nothing_behind(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    try:
        store = LocalStore(disk)
        with pytest.raises(StorageBusy, match="free some space"):
            store.create("big", bytes(1 << 20))

        assert list(disk.iterdir()) == []
        assert store.create("small", b"1")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- reading -------------------------------------------------------------------------------------


def test_listing_is_in_byte_order_of_whole_paths_as_on_s3(store):
    names = ["b", "a/z", "a.txt", "a-b/c", "a/b/c", "é", "B", "a0"]
    for name in names:
        store.create(name, b"x")

    assert paths(store) == sorted(names, key=os.fsencode)
    assert paths(store, "a") == ["a/b/c", "a/z"]


def test_a_range_ends_where_the_object_ends(store):
    store.create("x", b"0123456789")

    assert store.read("x", 3, 4) == b"3456"
    assert store.read("x", 8, 100) == b"89"
    assert store.read("x", 50, 10) == b""
    assert store.read("x", 5) == b"56789"


def test_an_object_that_was_written_again_is_not_mistaken_for_the_old_one(store):
    store.create("x", b"old")
    before = store.stat("x").etag
    assert store.read("x", etag=before) == b"old"

    store.replace("x", b"newer")

    with pytest.raises(ObjectChanged):
        store.read("x", etag=before)


def test_what_is_not_there_is_missing(store):
    with pytest.raises(StorageMissing):
        store.read("x")
    with pytest.raises(StorageMissing):
        list(store.list())
    assert store.stat("x") is None


def test_a_file_that_is_written_while_it_is_read_is_not_taken_for_the_old_one(store, monkeypatch):
    store.create("x", b"old")
    read = local._bytes_of

    def read_and_written(*where):
        data = read(*where)
        (store.root / "x").write_bytes(b"torn!")
        return data

    monkeypatch.setattr(local, "_bytes_of", read_and_written)
    with pytest.raises(ObjectChanged):
        store.read("x", etag=store.stat("x").etag)


def test_bytes_that_the_system_gives_in_pieces_are_all_read(store, monkeypatch):
    data = bytes(range(256)) * 5
    store.create("x", data)
    at_once = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, n, at: at_once(handle, min(n, 100), at))

    assert store.read("x") == data
    assert store.read("x", 7, 450) == data[7:457]
    assert store.read("x", 1200, 450) == data[1200:]
    assert store.read("x", 5000, 10) == b""


def test_a_file_of_a_size_that_the_system_does_not_know_is_read_to_its_end():
    proc = LocalStore(Path("/proc/self"))  # as some file systems in user space have it

    assert proc.stat("status").nbytes == 0
    assert b"VmHWM" in proc.read("status")
    assert len(proc.read("status", 5, 10)) == 10


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_on_a_bad_sector_costs_only_itself(store, monkeypatch, number):
    def opened(target):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(local, "_opened", opened)
    with pytest.raises(ObjectUnreadable, match="x: corrupt_read: "):
        store.read("x")


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "a/../../secret", "..", "x\0y"])
def test_a_path_that_leads_out_of_the_folder_is_neither_read_nor_written(store, tmp_path, path):
    (tmp_path / "secret").write_bytes(b"secret")
    store.create("a/x", b"1")

    for asked in (store.read, store.stat, store.delete, lambda p: store.create(p, b"")):
        with pytest.raises(StorageDenied, match="leads out of"):
            asked(path)
    assert store.create("a/..x/x..", b"1")


def test_a_folder_that_is_gone_or_empty_is_not_there(store, tmp_path):
    store.create("a/x", b"1")
    store.ensure_there()

    store.root.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageMissing):
        store.ensure_there()
    store.root.mkdir()  # as a mount point whose disk is gone
    with pytest.raises(StorageBusy, match="mounted"):
        store.ensure_there()


def test_a_folder_that_goes_while_it_is_listed_has_no_listing(store, tmp_path):
    for name in "abc":
        store.create(name, b"1")
    listing = store.list()
    next(listing)
    (store.root / "b").unlink()
    assert [found.regular for found in listing] == [False, True]

    listing = store.list()
    next(listing)
    store.root.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageMissing):
        list(listing)


@pytest.fixture
def nobody():
    """A folder that all may enter, and a way to be a user whom permissions bind."""
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody, and come back")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)

        @contextmanager
        def become():
            os.setresuid(65534, 65534, 0)
            try:
                yield
            finally:
                os.setresuid(0, 0, 0)

        yield LocalStore(Path(folder)), become


def test_a_file_may_be_closed_to_us_but_a_folder_that_is_stops_everything(nobody):
    store, become = nobody
    store.create("a/x", b"1")
    (store.root / "a/x").chmod(0)
    with become(), pytest.raises(ObjectUnreadable, match="Permission denied"):
        store.read("a/x")

    for mode in (0o000, 0o444):
        (store.root / "a").chmod(mode)
        with become(), pytest.raises(StorageDenied, match="Permission denied"):
            store.read("a/x")
        with become(), pytest.raises(StorageDenied, match="Permission denied"):
            list(store.list())


def test_links_are_followed_inside_the_root_only(store, tmp_path):
    outside = tmp_path / "secret.jpg"
    outside.write_bytes(b"secret")
    store.create("real.jpg", b"1")
    (store.root / "inside.jpg").symlink_to("real.jpg")
    (store.root / "outside.jpg").symlink_to(outside)
    (store.root / "dangling.jpg").symlink_to("nowhere")
    (store.root / "folder").symlink_to(tmp_path)

    regular = {found.path: found.regular for found in store.list()}

    assert regular == {
        "real.jpg": True, "inside.jpg": True, "outside.jpg": False, "dangling.jpg": False,
        "folder": False,
    }  # fmt: skip


def test_a_fifo_is_listed_but_never_opened(store):
    store.create("a.jpg", b"1")
    os.mkfifo(store.root / "pipe.jpg")

    assert [(f.path, f.regular) for f in store.list()] == [("a.jpg", True), ("pipe.jpg", False)]
    assert store.stat("pipe.jpg") is None
    with pytest.raises(StorageMissing, match="no regular file"):
        store.read("pipe.jpg")  # nobody ever writes to it


@pytest.mark.parametrize("kind", ["folder", "socket", "loop"])
def test_what_is_no_regular_file_any_more_is_missing(store, kind):
    store.root.mkdir()
    path = store.root / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("x")
    else:
        os.mknod(path, 0o600 | stat.S_IFSOCK)

    with pytest.raises(StorageMissing):
        store.read("x")


def test_names_that_are_no_utf8_can_be_listed_and_read(store):
    store.root.mkdir()
    raw = b"latin1-\xe9.jpg"
    Path(os.fsdecode(os.fsencode(store.root) + b"/" + raw)).write_bytes(b"x")

    (found,) = store.list()

    assert os.fsencode(found.path) == raw
    assert store.read(found.path, etag=found.etag) == b"x"


# -- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "https://bucket/prefix",
        "gs://bucket/prefix",
        "file:///etc",
        "s3:://bucket",
        "s3://",
        "s3:///prefix",
        "s3://Bucket/prefix",
        "s3://b/prefix",
        "s3://bucket/prefix?versionId=1",
        "s3://bucket/prefix#part",
        "simplecache::s3://bucket/prefix",
        "zip://a.zip::s3://bucket",
    ],
)
def test_an_address_of_another_kind_is_refused_by_name(uri):
    with pytest.raises(RunRefused, match=r"s3://bucket/prefix"):
        open_store(uri)


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/prefix",
        f"https://user:{SECRET}@host/path",
        f"https://{SECRET}@host",
        f"s3://bucket/prefix?X-Amz-Signature={SECRET}",
        f"https://host/path?a=b&secret={SECRET}",
        f"https://host/path#{SECRET}",
        f"simplecache::s3://AKIAEXAMPLE:{SECRET}@bucket/x",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(uri):
    with pytest.raises(RunRefused) as refused:
        open_store(uri)

    assert SECRET not in str(refused.value)
    assert "FEMI" not in str(refused.value)


def test_an_address_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert absolute("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert absolute("s3://bucket") == "s3://bucket"
    assert absolute("out/") == absolute("./x/../out") == str(tmp_path / "out")


# -- the promise that commits rest on ------------------------------------------------------------


class Forgetful(LocalStore):
    """A store that takes a conditional write for a plain one, as some S3 servers do."""

    def create(self, path, data):
        self.replace(path, data)
        return True


def test_a_store_that_ignores_the_condition_is_refused(tmp_path):
    with pytest.raises(RunRefused, match="If-None-Match"):
        check_create_only(Forgetful(tmp_path))


def test_a_good_store_is_left_as_it_was(store):
    check_create_only(store)

    assert paths(store) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(RunRefused, match="cannot write"):
        check_create_only(LocalStore(tmp_path / "file" / "below"))
