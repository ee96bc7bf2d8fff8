"""Exit codes, and child processes that never outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

EXIT_USAGE, EXIT_CHECKPOINTED = 2, 75
EXIT_BAD_NODE, EXIT_IN_USE, EXIT_NO_ROOM = 71, 73, 74
"""The node is at fault; another process has the stage; the disk is full. Each passes elsewhere or later by itself."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends, kill -9 included (Linux; elsewhere nothing).

    Args:
        parent_pid: who is expected to be the parent. When it has already gone, this process exits at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)
