"""Waiting out a store that is away: a training has much to lose, and nothing better to do."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import StorageBusy

log = logging.getLogger("maskfleet")

T = TypeVar("T")

PATIENCE_S = 600.0  # beyond what a store does itself (s3.py): a failover or an evening's upgrade
WAIT_S = 5.0


def patiently(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What the call returns, however often it takes while the store is busy.

    Raises:
        StorageBusy: still, after so many seconds.
    """
    start = time.monotonic()
    while True:
        try:
            return call()
        except StorageBusy as error:
            left = patience_s - (time.monotonic() - start)
            if left <= 0:
                raise
            log.warning("%s; trying for %.0f s more", error, left)
            time.sleep(min(WAIT_S, left))
