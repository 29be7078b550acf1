"""A real S3 server on 127.0.0.1: Ceph's object gateway, as Debian packages it.

    python -m tests.s3server FOLDER PORT      # prints the environment, serves until Ctrl-C

Three processes: a monitor (mon), one disk (osd) and the gateway (rgw). Unlike in-memory stand-ins
it checks signatures and survives kill -9, and its answer to `If-None-Match: *` holds in a race.
Install with `apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common`.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config

REGION = "us-east-1"
DAEMONS = {  # in the order of starting; stopping goes backwards
    "mon": ["ceph-mon", "-i", "a"],
    "osd": ["ceph-osd", "-i", "0"],
    "rgw": ["radosgw", "-n", "client.rgw"],
}
TOOLS = [
    *("ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool"),
    *("radosgw", "radosgw-admin", "setpriv"),
]
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
PORTS = range(20_000, 32_000)  # below Linux's ephemeral ports, above the disk's own 6800-7568
COMMAND_SECONDS = 60.0  # the slowest, creating the first user, takes 3 s on two busy cores
STOP_SECONDS = 20.0  # the disk flushes for up to 6 s
ANSWER_SECONDS = 30.0  # after kill -9 of all three the disk replays for 13 s

CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {folder}/run
admin socket = {folder}/run/$cluster-$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
mon cluster log file = {folder}/log/cluster.log
keyring = {folder}/keyring
debug ms = 0/0
debug rgw = 0/0
debug osd = 0/0
debug bluestore = 0/0
debug rocksdb = 0/0
debug bdev = 0/0
# cephx stays on: without it the gateway waits for an authenticated connection for ever
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
mon max pg per osd = 2000
# the default refuses to start on a disk that is 95 % full, which a shared machine often is
mon data avail crit = 1
# every pool is a round of the monitor's vote, and each would wait a second for company
paxos propose interval = 0.05
paxos min wait = 0.01
[mon.a]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
# a sparse file: 20 GiB is room, not use
bluestore block size = 21474836480
osd memory target = 1073741824
# the gateway's news of buckets and users waits this long for a gateway that was killed
osd client watch timeout = 3
[client.rgw]
# without tcp_nodelay every small GET waits 40 ms for a delayed acknowledgement
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw data = {folder}/rgw
rgw enable apis = s3, admin
rgw override bucket index max shards = 1
# a quota is to hold at once, not ten minutes after the last look
rgw bucket quota ttl = 0
"""


class S3ServerFailed(RuntimeError):
    """The server, or one of its commands, did not do what a test needs."""


@dataclass(frozen=True)
class Credentials:
    """One user's key pair, made up for one server that dies with the test run."""

    access_key: str
    secret_key: str = field(repr=False)

    def disguises(self) -> list[bytes]:
        """How they may stand in something that was written: as they are, or encoded."""
        plain = [self.access_key.encode(), self.secret_key.encode()]
        return [
            *plain,
            *(base64.b64encode(one).rstrip(b"=") for one in plain),
            *(one.hex().encode() for one in plain),
        ]


def why_not() -> str | None:
    """Say what keeps the server from running on this machine, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found; apt-get install {PACKAGES}"
    return None


def free_ports(count: int = 2) -> int:
    """Find the first of `count` consecutive free ports on 127.0.0.1."""
    for _ in range(200):
        first = random.SystemRandom().choice(PORTS)
        if all(_is_free(first + i) for i in range(count)):
            return first
    raise S3ServerFailed(f"no {count} consecutive free ports in {PORTS.start}-{PORTS.stop}")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class S3Server:
    """Start, stop, kill and pause one server; make its users and quotas.

    Making the object costs nothing and fixes endpoint and credentials; `create` starts it.
    """

    def __init__(self, folder: Path, port: int):
        self.folder = folder.resolve()
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.owner = Credentials("MASKFLEETTESTOWNER", secrets.token_hex(20))
        self._botocore = botocore.session.Session()  # reads its service models once: 0.2 s
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        # The kernel ends a child with the *thread* that made it (see _launch), so one thread that
        # lives as long as the server makes them all, whichever thread of a test asks.
        self._launcher = ThreadPoolExecutor(1, "s3server")

    # -- life ------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make an empty store and start it; about 10 s."""
        self._write_conf()
        self._make_keys()
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", self._monmap())
        self.start("mon")
        disk = str(uuid.uuid4())
        self._run("ceph", "osd", "new", disk, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self.start("osd")
        self._wait(lambda: "1 up" in self._run("ceph", "osd", "stat"), "the disk to come up")
        self.add_user("owner", self.owner)
        self.start("rgw")
        self.wait_until_it_answers()

    def start(self, name: str, *options: str) -> None:
        """Start one daemon; `--rgw_max_concurrent_requests=4` makes the gateway say SlowDown."""
        if name in self._running:
            raise S3ServerFailed(f"{name} is already running; stop or kill it first")
        for socket_file in (self.folder / "run").glob(f"*{DAEMONS[name][-1]}.asok"):
            socket_file.unlink()  # left by a kill -9
        program, *identity = DAEMONS[name]
        command = [program, "-c", str(self._conf), *identity, "-f", *options]
        self._running[name] = self._launcher.submit(self._launch, command, name).result()

    def wait_until_it_answers(self, seconds: float = ANSWER_SECONDS) -> None:
        """Return once a request reaches the disk; `GET /` alone answers with a dead disk too."""
        self._wait(lambda: self._probe() == 404, "the gateway to reach the disk", seconds)

    def stop(self, name: str) -> None:
        """Stop one daemon cleanly. Only in the order rgw, osd, mon: the disk waits for the mon."""
        running = self._running.pop(name)
        running.terminate()
        running.send_signal(signal.SIGCONT)  # a paused one cannot hear the first
        try:
            running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()

    def kill(self, name: str) -> None:
        """Kill one daemon with SIGKILL, as a power cut would."""
        running = self._running.pop(name)
        running.kill()
        running.wait()

    def pause(self, name: str) -> None:
        """Freeze one daemon: connections are accepted, nothing answers."""
        self._running[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a paused daemon go on."""
        self._running[name].send_signal(signal.SIGCONT)

    def recover(self) -> None:
        """Bring back whatever a test killed, stopped or paused, and wait until it answers."""
        for name in DAEMONS:
            if name not in self._running:
                self.start(name)
            elif self._running[name].poll() is not None:
                self._running.pop(name)
                self.start(name)
            else:
                self.resume(name)
        self.wait_until_it_answers()

    def close(self) -> None:
        """Stop everything that runs; the folder stays."""
        for name in reversed(DAEMONS):
            if name in self._running:
                self.stop(name)
        self._launcher.shutdown()

    # -- users -----------------------------------------------------------------------------------

    def environment(self, credentials: Credentials | None = None) -> dict[str, str]:
        """Name the variables by which any S3 client finds this server."""
        user = credentials or self.owner
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": user.access_key,
            "AWS_SECRET_ACCESS_KEY": user.secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def add_user(self, name: str, credentials: Credentials | None = None) -> Credentials:
        """Make a user who owns nothing yet."""
        made = credentials or Credentials(f"KEY{secrets.token_hex(6)}", secrets.token_hex(20))
        keys = (f"--access-key={made.access_key}", f"--secret-key={made.secret_key}")
        self.admin("user", "create", f"--uid={name}", f"--display-name={name}", *keys)
        return made

    def add_reader(self, bucket: str) -> Credentials:
        """Make a user who may list and read one bucket, and write nothing."""
        name = f"reader-{secrets.token_hex(4)}"
        reader = self.add_user(name)
        arn = f"arn:aws:s3:::{bucket}"
        policy = {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"AWS": [f"arn:aws:iam:::user/{name}"]},
                    "Action": ["s3:ListBucket", "s3:GetObject"],
                    "Resource": [arn, f"{arn}/*"],
                }
            ],
        }
        with self.client() as s3:
            s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        return reader

    def set_quota(self, bucket: str, objects: int) -> None:
        """Refuse the next object beyond this number with 403 QuotaExceeded: S3's full disk."""
        scope = ("--quota-scope=bucket", f"--bucket={bucket}")
        self.admin("quota", "set", *scope, f"--max-objects={objects}")
        self.admin("quota", "enable", *scope)

    def admin(self, *arguments: str) -> str:
        """Run `radosgw-admin`, for instance `("user", "suspend", "--uid=…")`."""
        return self._run("radosgw-admin", "-n", "client.rgw", *arguments)

    @contextmanager
    def client(
        self, credentials: Credentials | None = None, endpoint: str | None = None, attempts: int = 1
    ) -> Iterator[Any]:  # botocore makes its client classes at run time: there is no type to name
        """Open a botocore client that does not try again unless asked to."""
        user = credentials or self.owner
        client = self._botocore.create_client(
            "s3",
            region_name=REGION,
            endpoint_url=endpoint or self.endpoint,
            aws_access_key_id=user.access_key,
            aws_secret_access_key=user.secret_key,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "total_max_attempts": attempts},
                connect_timeout=3,
                read_timeout=20,
            ),
        )
        try:
            yield client
        finally:
            client.close()

    # -- inside ----------------------------------------------------------------------------------

    @property
    def _conf(self) -> Path:
        return self.folder / "ceph.conf"

    def _write_conf(self) -> None:
        if self._conf.exists():
            raise S3ServerFailed(f"{self.folder} already holds a server; give an empty folder")
        for name in ("mon", "osd", "rgw", "run", "log"):
            (self.folder / name).mkdir(parents=True)
        self._fsid = str(uuid.uuid4())
        text = CONF.format(
            fsid=self._fsid, folder=self.folder, port=self.port, mon_port=self.port + 1
        )
        self._conf.write_text(text)

    def _make_keys(self) -> None:
        keyring = str(self.folder / "keyring")
        everything = ("--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        self._run("ceph-authtool", "--create-keyring", keyring)
        for name, caps in {
            "mon.": (),
            "client.admin": everything,
            "osd.0": everything,
            "client.rgw": ("--cap", "osd", "allow rwx"),
        }.items():
            self._run(
                "ceph-authtool", keyring, "--gen-key", "-n", name, "--cap", "mon", "allow *", *caps
            )

    def _monmap(self) -> str:
        path = str(self.folder / "monmap")
        address = f"[v2:127.0.0.1:{self.port + 1}]"
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, path)
        return path

    def _launch(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        # pdeathsig: should the test run itself be killed, its server does not outlive it
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C is for us; we stop the three in their order
            )

    def _run(self, program: str, *arguments: str) -> str:
        command = [program, "-c", str(self._conf), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise S3ServerFailed(
                f"{program} {arguments[0]} gave no answer in {COMMAND_SECONDS:.0f} s; "
                f"{self._last_words()}"
            ) from None
        if done.returncode != 0:
            raise S3ServerFailed(
                f"{program} {arguments[0]} ended with {done.returncode}: {done.stderr[-500:]}"
            )
        return done.stdout

    def _probe(self) -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            # a new name each time: the gateway remembers those it did not find
            connection.request("GET", f"/nosuchbucket-{secrets.token_hex(6)}/x")
            return connection.getresponse().status
        return None

    def _wait(self, done: Callable[[], bool], what: str, seconds: float = COMMAND_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not done():
            dead = [n for n, r in self._running.items() if r.poll() is not None]
            if dead or time.monotonic() > end:
                why = f"{dead[0]} died" if dead else f"{seconds:.0f} s were not enough"
                raise S3ServerFailed(f"waiting for {what}: {why}; {self._last_words()}")
            time.sleep(0.05)

    def _last_words(self) -> str:
        logs = sorted((self.folder / "log").glob("*"))
        words = [f"{log.name}: {log.read_text(errors='replace')[-300:].strip()}" for log in logs]
        return " | ".join(words) or "no log was written"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder of a short name: it holds Unix sockets, whose paths end at 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="mf-s3-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Serve until Ctrl-C; the benchmarks' server."""
    if len(sys.argv) != 3 or why_not():
        sys.stderr.write(f"{why_not() or 'usage: python -m tests.s3server FOLDER PORT'}\n")
        return 2
    server = S3Server(Path(sys.argv[1]), int(sys.argv[2]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.create()
        for name, value in server.environment().items():
            print(f"export {name}={value}", flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        return 0
    finally:
        server.close()


if __name__ == "__main__":
    os.umask(0o077)  # the folder holds the owner's secret
    sys.exit(main())
