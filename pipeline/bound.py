"""Commands that do not outlive the process that starts them."""

import os
import sys
from collections.abc import Sequence

# PR_SET_PDEATHSIG (1): the kernel ends the command with its parent, however that ends: a signal,
# os._exit, a crash. It outlives execv. Linux alone has it; elsewhere a command may outlive a killed
# parent. The parent may have died before the call.
_BIND = """
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(137)
os.execv(sys.argv[2], sys.argv[2:])
"""


def bound(command: Sequence[str]) -> list[str]:
    """The same command, ended by the kernel when the thread that starts it is no more.

    To the kernel a parent is a thread: start it from one that lives as long as it is wanted.
    """
    bare = "-SP"  # no site-packages, nothing of this folder: all that is for the command
    return [sys.executable, bare, "-c", _BIND, str(os.getpid()), *command]
