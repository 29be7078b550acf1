"""What memory a process may have, as the kernel's files say, and what is refused for want of it."""

import pytest

from pipeline.config import Compute, SegmentConfig
from pipeline.errors import RunRefused
from pipeline.here import Here
from pipeline.memory import LEAST, MB, obtainable, refuse_too_little
from tests.archives import filled

NO_LIMIT = b"9223372036854771712\n"
MEMINFO = b"MemTotal: 9000 kB\nMemAvailable: 67108864 kB\nHugePages_Total: 0\nSwapFree: %d kB\n"


def machine(folder, groups: bytes, limits: dict[str, bytes], swap: int = 0):
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    own = {"proc/meminfo": MEMINFO % swap, "proc/self/cgroup": groups}
    return filled(folder, {**own, **files})


@pytest.mark.parametrize(
    ("groups", "limits", "megabytes"),
    [
        (b"0::/\n", {"memory.max": b"1073741824\n"}, 1024),
        (b"0::/\n", {"memory.max": b"max\n"}, None),
        (b"0::/\n", {}, None),
        # the tightest of those above counts
        (b"0::/a/b\n", {"a/b/memory.max": b"max\n", "a/memory.max": b"536870912\n"}, 512),
        # version 1, beside version 2; inside a container the path is the host's
        (b"4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": b"268435456\n"}, 256),
        (b"4:memory:/host/9f\n0::/\n", {"memory/memory.limit_in_bytes": b"268435456\n"}, 256),
        (b"4:memory:/x\n", {"memory/x/memory.limit_in_bytes": NO_LIMIT}, None),
        (b"3:cpu:/x\n", {"cpu/x/memory.limit_in_bytes": b"1\n"}, None),
    ],
)
def test_the_tightest_limit_counts(tmp_path, groups, limits, megabytes):
    found = obtainable(machine(tmp_path, groups, limits))

    if megabytes is None:
        assert found > 65_536 * MB  # what is free and what this process has
    else:
        assert found == megabytes * MB


def test_swap_comes_on_top_and_where_nobody_says_nothing_is_known(tmp_path):
    limited = machine(tmp_path / "a", b"0::/\n", {"memory.max": b"1048576\n"}, swap=1024)

    assert obtainable(limited) == 2 * MB
    assert obtainable(tmp_path / "nothing") is None


def test_this_machine_has_enough_for_these_tests():
    assert obtainable() > LEAST
    refuse_too_little(weights=1, processes=1)


def test_a_model_that_cannot_be_loaded_is_refused_with_the_numbers():
    with pytest.raises(
        RunRefused, match=r"weights \(1073741824 MB\) and code \(128 MB\), held by 2"
    ):
        refuse_too_little(weights=2**50, processes=2)


def test_a_place_refuses_it_before_it_loads_it():
    class Huge(bytes):
        def __len__(self):
            return 2**50

    config = SegmentConfig(source="/in", out="/out")
    with pytest.raises(RunRefused, match=r"--compute\.workers, a smaller model or more memory"):
        Here(Compute()).found((b"no card", Huge()), 1, config)
