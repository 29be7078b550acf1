"""Commands in process: what they leave in it is put back; sheets and probes are small."""

import logging
import signal
from collections.abc import Iterator

import pytest

from tests import learning


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """See `learning.quickly`: for a module's own fixtures, too, which may train."""
    with learning.quickly():
        yield


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put signal handlers and the logger back; no Ray job surrounds a test."""
    log = logging.getLogger("maskfleet")
    handlers, propagate = log.handlers[:], log.propagate
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setattr("pipeline.overview.SIDE", 32)
    yield
    log.handlers[:], log.propagate = handlers, propagate
    for number, handler in heard.items():
        signal.signal(number, handler)
