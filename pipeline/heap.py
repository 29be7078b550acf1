"""The heap of a process that predicts: kept between operations, its holes given back now and then.

All of it concerns glibc; where there is none nothing happens.
"""

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
WANT = ("allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""What errors for want of memory say: the host's, a GPU's, pinned memory's, cuBLAS's, cuDNN's."""
MB = 1024**2
PAGE = os.sysconf("SC_PAGE_SIZE")
PAUSE_S = 3.0  # between two trims at least
S_PER_GB = 30.0  # and for each gigabyte that one gave back: it costs some 0.3 s of faults, so 1 %


def out_of_memory(error: BaseException) -> bool:
    """Whether it is for want of memory, the host's or a GPU's; torch has no one class for that."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in WANT)


def one_arena() -> None:
    """One arena for all threads, from before there are any.

    Arenas of their own never give each other what they have freed (growth over 10,000 pictures),
    and what is larger than 64 MB they map anew each time: of 900 pictures of many sizes 14 % of the
    time went into page faults (2026-11-29). Arenas that are there already stay; so commands begin
    with this (jobs/__init__.py), and a Ray worker is told at its start (cluster.py).
    """
    _glibc("mallopt", M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Keep what is freed instead of giving it back after every operation.

    Page faults cost as much as the arithmetic otherwise (MODELS §1.6.10: 980 -> 490 ms a picture).
    """
    one_arena()
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2_000_000_000), (M_TOP_PAD, 64 * MB)):
        _glibc("mallopt", option, value)


def _glibc(name: str, *arguments: int) -> None:
    with suppress(OSError, AttributeError):  # no glibc
        getattr(ctypes.CDLL("libc.so.6"), name)(*arguments)


class Holes:
    """Gives back the holes that pictures of many sizes leave in the heap, as often as it is cheap.

    Most are soon filled again, each page at the cost of a fault: a gigabyte every 3 s is 6 % of the
    time (2026-11-29). Never, and a process creeps from 500 to 850 MB in 10,000 pictures.
    """

    def __init__(self) -> None:
        self._next = time.monotonic() + PAUSE_S

    def give_back(self) -> None:
        """Between fragments."""
        now = time.monotonic()
        if now < self._next:
            return
        before = _resident()
        _trim()
        given = max(0, before - _resident())
        self._next = now + max(PAUSE_S, S_PER_GB * given / 1024**3)


def _resident() -> int:
    """Bytes; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except FileNotFoundError:
        return 0


def _trim() -> None:
    _glibc("malloc_trim", 0)
