"""`maskfleet schedule`, `submit` and `jobs` in process: what they say, refuse and leave behind."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobs import _ray, jobs, schedule, submit
from pipeline.errors import RunRefused
from pipeline.schedule import Spec
from pipeline.storage import open_store
from pipeline.timetable import Timetable


@pytest.fixture
def call(tmp_path, capfd):
    """`maskfleet schedule WHAT <a folder> …`; answers the exit code and what was said."""

    def called(what, *words):
        code = schedule.main([what, str(tmp_path / "schedules"), *words])
        out, err = capfd.readouterr()
        return code, out, err

    return called


NIGHTLY = ("nightly", "--cron", "30 3 * * *", "--zone", "Europe/Berlin")
JOB = ("--", "status", "/srv/run", "--json", "--my_flag")


# -- what lies on storage ------------------------------------------------------------------------


def test_a_schedule_is_added_listed_paused_resumed_and_removed(call):
    code, _, err = call("add", *NIGHTLY, *JOB)
    assert code == 0
    assert "next at" in err
    assert "03:30" in err
    _, out, _ = call("list", "--json")
    (about,) = map(json.loads, out.splitlines())
    assert about["job"] == ["status", "/srv/run", "--json", "--my_flag"]
    assert (about["state"], about["last"]) == ("active", "never ran")
    assert call("pause", "nightly")[0] == 0
    assert "paused" in call("list")[1]
    assert "next -" in call("list")[1]
    assert call("resume", "nightly")[0] == 0
    assert "active" in call("list")[1]
    assert call("remove", "nightly")[0] == 0
    assert call("list")[1] == ""
    code, _, err = call("pause", "nightly")
    assert code == 2
    assert "there is no schedule nightly" in err


def test_adding_the_same_again_changes_nothing_and_another_one_is_refused(call, tmp_path):
    call("add", *NIGHTLY, *JOB)
    code, _, err = call("add", *NIGHTLY, *JOB)
    assert code == 0
    assert "just so" in err
    assert len(list((tmp_path / "schedules/nightly/spec").iterdir())) == 1
    code, _, err = call("add", *NIGHTLY, "--", "status", "/srv/other")
    assert code == 2
    assert "--replace" in err
    assert call("add", *NIGHTLY, "--replace", "--", "status", "/srv/other")[0] == 0
    assert "/srv/other" in call("list")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nightly", "--cron", "30 3 * *", "--", "status"), "has 4 fields"),
        (("nightly", "--cron", "30 3 * * *", "--", "stats"), "did you mean status"),
        (("nightly", "--cron", "30 3 * * *", "--", "submit"), "makes no sense on a schedule"),
        (("nightly", "--cron", "30 3 * * *"), "say what to run"),
        (("Nightly", "--cron", "30 3 * * *", "--", "status"), "cannot name a schedule"),
        ((*NIGHTLY, "--address", "head:8265", *JOB), "not the address of a dashboard"),
        ((*NIGHTLY, "--address", "http://me:secret@head:8265", *JOB), "not the address"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(call, tmp_path, words, said):
    code, out, err = call("add", *words)
    assert code == 2
    assert said in err
    assert "secret" not in out + err
    assert not list(tmp_path.rglob("*.json"))


def scheduled(tmp_path: Path, **more: object) -> Timetable:
    """A schedule of every midnight, the last of which was missed."""
    timetable = Timetable(open_store(str(tmp_path / "schedules")))
    spec = {"cron": "0 0 * * *", "command": "status", "identity": "1d", **more}
    since = datetime.now(UTC) - timedelta(days=3)
    timetable.change("nightly", 0, Spec(**spec, since=since))
    return timetable


def test_a_tick_runs_what_is_due_as_a_child_reports_its_failure_and_is_quiet_afterwards(
    call, tmp_path
):
    scheduled(tmp_path, arguments=(str(tmp_path / "no-run-{tick}"),))
    code, _, err = call("tick")
    assert code == 2  # the job's own: there is no such run
    assert "holds no run" in err
    assert f"no-run-{datetime.now(UTC):%Y-%m-%d}T0000Z" in err
    assert "FAILED nightly" in err
    assert call("tick") == (0, "", "")
    _, out, _ = call("history", "nightly", "--json")
    (record,) = map(json.loads, out.splitlines())
    assert (record["attempt"], record["outcome"]) == (1, 2)
    assert "FAILED (2)" in call("list")[1]


def test_a_tick_of_nothing_is_quiet_and_one_of_an_unknown_name_is_refused(call, tmp_path):
    assert call("tick") == (0, "", "")
    assert call("tick", "nightly")[0] == 2


@pytest.mark.parametrize("kind", ["kuberay", "cronjob"])
def test_a_schedule_in_a_local_folder_cannot_be_printed_for_pods(call, kind):
    call("add", *NIGHTLY, *JOB)
    code, out, err = call("print", "nightly", "--as", kind)
    assert (code, out) == (2, "")
    assert "no pod sees" in err


def test_a_crontab_line_names_the_program_and_the_folder(call, tmp_path):
    call("add", *NIGHTLY, *JOB)
    _, out, _ = call("print", "nightly", "--as", "crontab")
    assert out.endswith(f"maskfleet schedule tick {tmp_path}/schedules nightly\n")


# -- submit: what is ours, what the command's ----------------------------------------------------


def test_what_stands_before_the_command_is_ours_and_all_after_it_the_commands():
    words = ["--address", "http://h:8265", "--no-follow", "--env=HOME", "segment", "s3://b/in"]
    options, command, arguments = submit.parsed([*words, "--out", "s3://b/out", "--address", "x"])
    assert (options.address, options.follow, options.env) == ("http://h:8265", False, ("HOME",))
    assert command == "segment"
    assert arguments == ("s3://b/in", "--out", "s3://b/out", "--address", "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to submit"),
        (["--no-follow"], "say what to submit"),
        (["segmnt", "x"], "did you mean segment"),
        (["jobs", "list"], "from outside"),
        (["status", "x"], "no cluster is given"),
        (["--address", "ray://h:10001", "status"], "not the address of a dashboard"),
        (["--address", "h:8265", "status"], "not the address of a dashboard"),
        (["--address", "http://h:8265", "--env", "AWS_SECRET_ACCESS_KEY", "status"], "a secret"),
        (["--address", "http://h:8265", "train", "--mlflow", "http://a:b@h"], "holds a password"),
        (["--address", "http://h:8265", "--env", "NO_SUCH_VARIABLE", "status"], "is not set here"),
        (["--address", "http://h:8265", "--working-dir", "/no/such", "status"], "not a folder"),
    ],
)
def test_a_submission_that_cannot_work_is_refused_before_anything_is_sent(words, said, capsys):
    assert submit.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["list"], ["logs", "mf-1"], ["stop", "mf-1"]])
def test_jobs_asks_for_an_address(words, capsys):
    assert jobs.main(words) == 2
    assert "no cluster is given" in capsys.readouterr().err


def test_an_address_may_come_from_rays_own_variable(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head:8265")
    with pytest.raises(RunRefused, match="not the address of a dashboard"):
        _ray.RayJobs(None)


# -- what is sent --------------------------------------------------------------------------------


def write(folder: Path, path: str, size: int = 1) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(bytes(size))


def test_keys_environments_runs_and_data_stay_at_home(tmp_path):
    checkout = tmp_path / "checkout"
    kept = ["jobs/segment.py", "models/demo/weights.safetensors", "configs/a b.yaml"]
    home = [
        ".git/config", ".env", "cluster.pem", "deep/server.key", "deep/.aws/config",
        "my-env/pyvenv.cfg", "my-env/lib/x.py", "run/run.json", "run/masks.zarr/zarr.json",
        "masks.zarr/zarr.json", "maskfleet.egg-info/PKG-INFO", "jobs/__pycache__/a.pyc",
        "gcp-credentials.json", "id_rsa", "Service-Account.json", "PROD.PEM",
        "ignored/secrets.yaml", "od[d] name*/run.json",
    ]  # fmt: skip
    for path in kept + home:
        write(checkout, path)
    write(checkout, "data/large.tif", _ray.LARGEST + 1)
    write(checkout, ".gitignore")
    (checkout / ".gitignore").write_text("ignored/\n")
    write(tmp_path, "outside.txt")
    (checkout / "link.txt").symlink_to(tmp_path / "outside.txt")
    (checkout / "loop").symlink_to(checkout, target_is_directory=True)
    (checkout / "jobs/inside.py").symlink_to(checkout / "jobs/segment.py")

    left_out = _ray.packed(checkout)

    assert sent(checkout, left_out) == sorted([*kept, "jobs/inside.py"])


def sent(folder: Path, left_out: list[str]) -> list[str]:
    """What Ray puts into the package."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    target = folder.parent / "package.zip"
    create_package(str(folder), target, include_gitignore=True, excludes=left_out)
    with zipfile.ZipFile(target) as package:
        return sorted(name for name in package.namelist() if not name.endswith("/"))


def test_a_package_that_no_cluster_takes_is_refused_naming_the_largest(tmp_path):
    for number in range(120):  # 600 MB, none of it on disk
        write(tmp_path, f"frames/{number}.png", 0)
        os.truncate(tmp_path / f"frames/{number}.png", _ray.LARGEST)
    write(tmp_path, "jobs/a.py")
    with pytest.raises(RunRefused, match=r"frames \(629 MB\)"):
        _ray.packed(tmp_path)


def test_this_checkout_is_small_enough_to_send():
    folder = _ray.working_folder()
    assert folder is not None
    left_out = _ray.packed(folder)
    assert "/.git" in left_out
    assert not any(path.startswith("/models/demo") for path in left_out)
