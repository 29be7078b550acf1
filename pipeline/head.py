"""Whether the head of a Ray cluster is still there, and what to say where it is not.

A process whose head is gone is ended by Ray itself after a minute
(RAY_gcs_rpc_server_reconnect_timeout_s), from C++, with exit code 1 and not a word. So a thread
looks, and ends it sooner: with our code and a sentence. A head that comes back in time is waited
for.
"""

import logging
import os
import shutil
import socket
import tempfile
import threading
import time

from pipeline.errors import EXIT_UNFINISHED

log = logging.getLogger("maskfleet")

RAYS_PATIENCE_S = 60.0  # Ray 2.60's default
SHARE = 0.7  # of Ray's patience, so that we are first
LOOKS = 10  # at the head in that time
WANTED_BYTES = 50 * 1024**2  # logs and sockets of a session; what is spilled comes later


def watched(address: str) -> threading.Event:
    """Look after the head at this ``host:port`` until the event is set."""
    told = os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "")  # noqa: SIM112 - Ray's
    patience = SHARE * (float(told) if told else RAYS_PATIENCE_S)
    ending = threading.Event()
    looked_at = (address, patience, ending)
    threading.Thread(target=_look, args=looked_at, daemon=True, name="head").start()
    return ending


def hint(address: str) -> str:
    """What may be wrong where something listens and Ray cannot connect; Ray does not say."""
    _, _, port = address.rpartition(":")
    if not port.isdecimal() or not _answers(*_parts(address), LOOKS):
        return ""
    return (
        "; something listens there: is it a head of Ray 2.60, and is the token "
        "(~/.ray/auth_token, RAY_AUTH_TOKEN_PATH) the cluster's?"
    )


def crowded() -> str:
    """What may be wrong where a cluster of our own does not start: Ray writes to a folder first."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"; Ray keeps its session in {folder}: {error.strerror}"
    if free > WANTED_BYTES:
        return ""
    return (
        f"; {folder}, where Ray keeps its session, has {free // 1024**2} MB left: free some, or "
        "set RAY_TMPDIR to another folder"
    )


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _look(address: str, patience_s: float, ending: threading.Event) -> None:
    place = _parts(address)
    seen = time.monotonic()
    while time.monotonic() - seen < patience_s:
        if _answers(*place, patience_s):
            seen = time.monotonic()
        if ending.wait(patience_s / LOOKS):
            return
    log.error(
        "not finished: the head of the Ray cluster, %s, has not been there for %.0f s; what is "
        "committed stays, run the same command again when it is back, or elsewhere",
        address,
        patience_s,
    )
    os._exit(EXIT_UNFINISHED)  # Ray's own threads wait for the head, and would never come back


def _answers(host: str, port: int, patience_s: float) -> bool:
    try:
        socket.create_connection((host, port), timeout=patience_s / LOOKS).close()
    except OSError:
        return False
    return True
