"""Make sure that no process outlives the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil

PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Have Linux kill this process when its parent dies, even while vLLM starts and the socket is not read."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)


class Ancestor:
    """An ancestor of this process, whose end is to be noticed; `pid` None, or of no ancestor, never ends."""

    def __init__(self, pid: int | None) -> None:
        self._process = next((p for p in psutil.Process().parents() if p.pid == pid), None)

    def has_ended(self) -> bool:
        """Whether the process has exited, is a zombie, or its pid has been reused."""
        try:
            return self._process is not None and (
                not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True
