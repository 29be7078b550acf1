"""A proxy between a client and the S3 server that does what networks and stores do wrong.

It forwards raw HTTP and leaves the Host header alone, so signatures stay valid:

    proxy.fault("503", method="PUT", path="*/c/*", times=2)
    proxy.fault("lost_answer", path="*/c/7", times=1)
    ...
    assert proxy.seen("PUT", "*/c/7") == 2

The first rule that matches a request and has not spent its `times` decides; without one the
request passes untouched.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import unquote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreCredentials

from tests.s3server import REGION, Credentials, S3Server

ERRORS = {  # answered without asking the server
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "stale404": (404, "NoSuchKey"),  # the object is there, this listing or replica is behind
    "200_error": (200, "InternalError"),  # as S3 does once it has begun to answer
}
FAULTS = {
    **{name: f"answers {code} {word}" for name, (code, word) in ERRORS.items()},
    "reset": "resets the connection; the server never hears of it",
    "drop": "closes the connection; the server never hears of it",
    "hang": "says nothing for `seconds`, then closes; the server never hears of it",
    "delay": "forwards `seconds` late",
    "slow": "sends the body in ten pieces, spread over `seconds`",
    "duplicate": "delivers the request twice; the client hears the second answer",
    "lost_answer": "delivers the request, then resets instead of answering",
    "ignore_condition": "takes If-None-Match away, as a store does that does not know it",
    "truncate": "sends the full length in the header and half of the body",
    "short": "sends half of the body and says that is all",
    "bitflip": "flips one bit of the body",
}
UNHEARD = ("reset", "drop", "hang")  # never reach the server, and get no answer
LINE_LIMIT = 1 << 20  # bytes of one header; keys alone may be 1 KB, percent-escaped three
SIGNED_ANEW = ("authorization", "x-amz-date", "if-none-match", "connection", "expect")


@dataclass
class Rule:
    """When to do what; `times` counts down."""

    fault: str
    method: str = "*"
    path: str = "*"
    probability: float = 1.0
    times: float = float("inf")
    seconds: float = 0.0
    done: int = 0

    def matches(self, method: str, path: str) -> bool:
        """Tell whether this rule speaks about such a request and has not spent itself."""
        return (
            self.done < self.times
            and fnmatchcase(method, self.method)
            and fnmatchcase(path, self.path)
        )


@dataclass
class Message:
    """One request or answer: its first line, its headers as sent, its body without chunks."""

    first: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str:
        """Return the header's value, or an empty string."""
        return next((v for n, v in self.headers if n.lower() == name), "")

    def without(self, *names: str) -> list[tuple[str, str]]:
        """Return the headers less those."""
        return [(n, v) for n, v in self.headers if n.lower() not in names]

    def bytes(self, *, claims: int | None = None) -> bytes:
        """Serialise; `claims` is a Content-Length that need not be true."""
        headers = self.headers
        if claims is not None:
            headers = self.without("content-length", "transfer-encoding")
            headers.append(("Content-Length", str(claims)))
        lines = [self.first, *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body


@dataclass
class FaultProxy:
    """A proxy in a thread of its own, on a free port of 127.0.0.1; a context manager."""

    server: S3Server
    seed: int = 0
    rules: list[Rule] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of every request that arrived, in order."""
    done: Counter[str] = field(default_factory=Counter)
    """How often each fault happened; "pass" for a request left alone."""

    def fault(
        self,
        fault: str,
        method: str = "*",
        path: str = "*",
        *,
        probability: float = 1.0,
        times: float = float("inf"),
        seconds: float = 0.0,
    ) -> Rule:
        """Add a rule; `path` is a glob over `/bucket/key` as the key reads, `*` crosses slashes."""
        if fault not in FAULTS:
            raise ValueError(f"no fault {fault!r}; there are {', '.join(FAULTS)}")
        rule = Rule(fault, method, path, probability, times, seconds)
        with self._lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules and counts."""
        with self._lock:
            self.rules.clear()
            self.requests.clear()
            self.done.clear()

    def seen(self, method: str = "*", path: str = "*") -> int:
        """Count the requests that arrived, faulty or not."""
        with self._lock:
            return sum(fnmatchcase(m, method) and fnmatchcase(p, path) for m, p in self.requests)

    # -- life ------------------------------------------------------------------------------------

    def __post_init__(self):
        self._lock = threading.Lock()
        self._random = random.Random(self.seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: set[asyncio.Task[None]] = set()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="faultproxy")

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        listening = await asyncio.start_server(
            self._connected, sock=self._listener, limit=LINE_LIMIT
        )
        self._up.set()
        await self._end.wait()
        listening.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._connections.add(task)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went, or the server did: closing says so to whoever is left
        except asyncio.CancelledError:
            writer.transport.abort()  # the test is over; a client that reads nothing cannot hold us
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    # -- one request -----------------------------------------------------------------------------

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; tell whether the connection goes on."""
        request = await _read_head(reader)
        if request.header("expect").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await _read_body(reader, request, to_the_end=False)
        method, target, _ = request.first.split(" ", 2)
        rule = self._choose(method, unquote(target.split("?", 1)[0]))
        await asyncio.sleep(rule.seconds if rule.fault != "slow" else 0)
        if rule.fault in ERRORS:
            writer.write(_error(*ERRORS[rule.fault]))
            await writer.drain()
            return False
        if rule.fault in UNHEARD:
            _leave(writer, reset=rule.fault == "reset")
            return False
        return await self._forward(request, rule, writer)

    async def _forward(self, request: Message, rule: Rule, writer: asyncio.StreamWriter) -> bool:
        fault = rule.fault
        if fault == "ignore_condition":
            request = _unconditional(request, self.endpoint, self.server.owner)
        if fault == "duplicate":
            await self._ask(request)
        answer = await self._ask(request)
        if fault == "lost_answer":
            _leave(writer, reset=True)
            return False
        if fault == "slow":
            await _dribbled(answer, rule.seconds, writer)
            return True
        damage = DAMAGE.get(fault) if answer.body else None  # a HEAD keeps its length
        writer.write(damage(answer, self._random) if damage else answer.bytes())
        await writer.drain()
        return fault != "truncate"

    def _choose(self, method: str, path: str) -> Rule:
        with self._lock:
            self.requests.append((method, path))
            for rule in self.rules:
                if rule.matches(method, path) and self._random.random() < rule.probability:
                    rule.done += 1
                    self.done[rule.fault] += 1
                    return rule
            self.done["pass"] += 1
            return Rule("pass")

    async def _ask(self, request: Message) -> Message:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.server.port, limit=LINE_LIMIT
        )
        try:
            sent = Message(request.first, request.without("expect"), request.body)
            writer.write(sent.bytes(claims=len(sent.body) if sent.body else None))
            await writer.drain()
            answer = await _read_head(reader)
            status = answer.first.split(" ")[1]
            if not request.first.startswith("HEAD ") and status not in ("204", "304"):
                await _read_body(reader, answer, to_the_end=True)
                answer.headers = answer.without("transfer-encoding", "content-length")
                answer.headers.append(("Content-Length", str(len(answer.body))))
            return answer
        finally:
            writer.close()


async def _read_head(reader: asyncio.StreamReader) -> Message:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip("\r\n").split("\r\n")
    fields = [line.partition(":") for line in lines]
    return Message(first, [(name, value.strip()) for name, _, value in fields])


async def _read_body(reader: asyncio.StreamReader, message: Message, *, to_the_end: bool) -> None:
    if message.header("transfer-encoding").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            message.body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif length := message.header("content-length"):
        message.body = await reader.readexactly(int(length))
    elif to_the_end:
        message.body = await reader.read()


def _error(code: int, word: str) -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{word}</Code><Message>injected</Message></Error>'
    headers = [("Content-Type", "application/xml"), ("Connection", "close")]
    return Message(f"HTTP/1.1 {code} {word}", headers, body.encode()).bytes(claims=len(body))


async def _dribbled(answer: Message, seconds: float, writer: asyncio.StreamWriter) -> None:
    body, size = answer.body, math.ceil(len(answer.body) / 10) or 1
    writer.write(Message(answer.first, answer.headers).bytes())
    for start in range(0, len(body), size):
        await asyncio.sleep(seconds / 10)
        writer.write(body[start : start + size])
        await writer.drain()


def _leave(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset:  # a linger time of zero makes the kernel send RST instead of FIN
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def _unconditional(request: Message, endpoint: str, owner: Credentials) -> Message:
    """Take the condition away and sign anew, for the client's signature covers it."""
    method, target, _ = request.first.split(" ", 2)
    headers = dict(request.without(*SIGNED_ANEW))
    signed = AWSRequest(method, endpoint + target, headers, request.body)
    keys = BotocoreCredentials(owner.access_key, owner.secret_key)
    S3SigV4Auth(keys, "s3", REGION).add_auth(signed)
    return Message(request.first, list(signed.headers.items()), request.body)


def _truncated(answer: Message, _: random.Random) -> bytes:
    half = Message(answer.first, answer.headers, answer.body[: len(answer.body) // 2])
    return half.bytes(claims=len(answer.body))


def _shortened(answer: Message, _: random.Random) -> bytes:
    half = Message(answer.first, answer.headers, answer.body[: len(answer.body) // 2])
    return half.bytes(claims=len(half.body))


def _bit_flipped(answer: Message, chance: random.Random) -> bytes:
    body = bytearray(answer.body)
    body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    return Message(answer.first, answer.headers, bytes(body)).bytes()


DAMAGE: dict[str, Callable[[Message, random.Random], bytes]] = {
    "truncate": _truncated,
    "short": _shortened,
    "bitflip": _bit_flipped,
}
