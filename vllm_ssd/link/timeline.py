"""What a process does when, one JSON line each, for `vllm-ssd trace`.

Target and drafter each write a file beside the one that `VLLM_SSD_TRACE` names. Both read CLOCK_MONOTONIC, which all
processes of a machine share. Lines hold request ids, lengths and numbers, never tokens.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from typing import Any

TRACE_ENV = "VLLM_SSD_TRACE"
"""Environment variable with the path that a drafter appends its outcomes to; `timeline_path` adds to it."""
FLUSH_NS = 500_000_000
"""A process that is killed loses what it did since."""


def timeline_path(trace: str, side: str, pid: int) -> str:
    """The file of one process; `vllm-ssd trace` finds all of a trace by this pattern."""
    return f"{trace}.{side}.{pid}.timeline"


class Timeline:
    """Appends spans and instants of one process to its file; for one thread at a time."""

    def __init__(self, trace: str, side: str) -> None:
        self._file = open(timeline_path(trace, side, os.getpid()), "a", buffering=1 << 16)
        self._flushed_ns = time.monotonic_ns()
        self._write({"process": side, "pid": os.getpid()})
        self._file.flush()
        atexit.register(self._file.flush)

    def span(self, track: str, name: str, start_ns: int, end_ns: int, **details: Any) -> None:
        """Something that lasted from `start_ns` to `end_ns`, of `time.monotonic_ns`; no two of a track overlap."""
        self._write({"track": track, "name": name, "at": start_ns, "for": max(end_ns - start_ns, 0)} | details)

    def instant(self, track: str, name: str, **details: Any) -> None:
        """Something that happened now."""
        self._write({"track": track, "name": name, "at": time.monotonic_ns()} | details)

    def flush(self) -> None:
        """Leave nothing unwritten: a process that is killed loses what it has not flushed."""
        self._file.flush()
        self._flushed_ns = time.monotonic_ns()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        now = time.monotonic_ns()
        if now - self._flushed_ns > FLUSH_NS:
            self.flush()
