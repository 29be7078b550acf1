"""What a process that predicts keeps of its heap, and when it gives back."""

import subprocess
import sys

import pytest

from pipeline import heap

ARENAS = """
import ctypes, threading
import jobs
import pyarrow

together = threading.Barrier(4)

def allocates():
    together.wait()
    bytearray(1000)

threads = [threading.Thread(target=allocates) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL("libc.so.6")
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def test_threads_of_a_command_share_one_arena():
    said = subprocess.run(
        [sys.executable, "-c", ARENAS], capture_output=True, text=True, check=True
    ).stdout
    assert said.count("<heap nr=") == 1


class Machine:
    """A clock and resident memory that a test sets, and how often holes were given back."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.resident, self.trims = 100.0, 0, 0
        patch.setattr(heap.time, "monotonic", lambda: self.now)
        patch.setattr(heap, "_resident", lambda: self.resident)
        patch.setattr(heap, "_trim", self.trim)

    def trim(self) -> None:
        self.trims += 1

    def after(self, seconds: float, resident: int, level: heap.Level) -> int:
        """How often it has given back, once so much is resident so much later."""
        self.now += seconds
        self.resident = resident
        level.keep()
        return self.trims


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_at_first_it_only_learns(machine):
    level = heap.Level()
    assert [machine.after(7, resident, level) for resident in (300, 900, 500, 800)] == [0] * 4


def test_afterwards_it_gives_back_what_is_more_than_it_needed_then(machine):
    level = heap.Level()
    machine.after(10, 500, level)
    machine.after(heap.LEARN_S, 400, level)
    assert machine.after(1, 500, level) == 0
    assert machine.after(1, 501, level) == 1


def test_after_giving_back_it_pauses(machine):
    level = heap.Level()
    machine.after(10, 500, level)
    assert machine.after(heap.LEARN_S, 600, level) == 1
    assert machine.after(heap.PAUSE_S / 2, 600, level) == 1
    assert machine.after(heap.PAUSE_S, 600, level) == 2


def test_where_the_kernel_does_not_say_it_gives_nothing_back(machine):
    level = heap.Level()
    assert [machine.after(heap.LEARN_S, 0, level) for _ in range(3)] == [0] * 3
