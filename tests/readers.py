"""What a child of `pipeline.apart` is asked to do with a file; it imports this."""

import os
import sys
import time
from pathlib import Path

from pipeline.foreign_table import cells

DEATHS = Path("deaths")
"""In the folder where one is started: a reader dies as often as the file has bytes."""


def words(file, *more):
    yield from file.read().split()
    yield more


def who(file):
    yield os.getpid()


def aborts(file, after):
    yield from range(after)
    os.abort()


def hangs(file):
    yield "begun"
    time.sleep(600)


def naps(file, seconds):
    time.sleep(seconds)
    for at in (0, 4, 8):
        file.seek(at)
        yield file.read(3)


def many(file, count):
    yield from (bytes(100_000) for _ in range(count))


def eats(file):
    yield len(bytes(16 * 1024**3))


def refuses(file):
    yield 1
    raise ValueError("not like this")


def fails(file):
    yield file.no_such_thing


def dying_cells(file, wanted, *how):
    """`cells`, until two rows of the table have been read."""
    for number, cell in enumerate(cells(file, list(wanted), *how)):
        if number == 2:
            _die()
        yield cell


def cells_and_death(file, wanted, *how):
    """`cells`, all of them."""
    yield from cells(file, list(wanted), *how)
    _die()


def _die():
    if left := DEATHS.read_bytes():
        DEATHS.write_bytes(left[1:])
        os.abort()


def environment(file):
    yield dict(os.environ)


def modules(file):
    yield sys.path
