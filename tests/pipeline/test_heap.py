"""What a process that predicts keeps of its heap, and when it gives back."""

import subprocess
import sys

import pytest

from pipeline import heap

GB = 1024**3
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
    """A clock, and a heap of which every trim gives so much back."""

    def __init__(self, patch: pytest.MonkeyPatch, given: int) -> None:
        self.now, self.resident, self.given, self.trims = 100.0, 10 * GB, given, []
        patch.setattr(heap.time, "monotonic", lambda: self.now)
        patch.setattr(heap, "_resident", lambda: self.resident)
        patch.setattr(heap, "_trim", self.trim)

    def trim(self) -> None:
        self.trims.append(self.now - 100.0)
        self.resident -= self.given

    def run(self, seconds: int) -> list[float]:
        """When it gave back, if a fragment ends every second."""
        holes = heap.Holes()
        for _ in range(seconds):
            self.now += 1.0
            holes.give_back()
        return self.trims


def test_small_holes_are_given_back_every_few_seconds(monkeypatch):
    assert Machine(monkeypatch, given=GB // 100).run(10) == [3.0, 6.0, 9.0]


def test_what_costs_more_is_given_back_less_often(monkeypatch):
    assert Machine(monkeypatch, given=GB).run(70) == [3.0, 33.0, 63.0]


def test_where_the_kernel_does_not_say_holes_are_given_back_all_the_same(monkeypatch):
    machine = Machine(monkeypatch, given=0)
    machine.resident = 0
    assert machine.run(7) == [3.0, 6.0]
