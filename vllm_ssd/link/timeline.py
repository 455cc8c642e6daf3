"""Timeline files for `vllm-ssd trace`: what a process did when, one JSON object per line.

Target and drafter each write a file next to the path in `VLLM_SSD_TRACE`. Both use CLOCK_MONOTONIC, which all processes
of a machine share. Lines contain request ids, lengths and numbers, never tokens.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from typing import Any

TRACE_ENV = "VLLM_SSD_TRACE"
"""Environment variable with the path that a drafter appends its outcomes to, and the prefix of timeline files."""
FLUSH_NS = 500_000_000
"""Longest time between flushes; a killed process loses at most this much."""


def timeline_path(trace: str, side: str, pid: int) -> str:
    """Path of a process's timeline; `vllm-ssd trace` finds the files of a trace by this pattern."""
    return f"{trace}.{side}.{pid}.timeline"


class Timeline:
    """Writes a process's spans and instants to its timeline file; not thread-safe."""

    def __init__(self, trace: str, side: str) -> None:
        self._file = open(timeline_path(trace, side, os.getpid()), "a", buffering=1 << 16)
        self._flushed_ns = time.monotonic_ns()
        self._write({"process": side, "pid": os.getpid()})
        self._file.flush()
        atexit.register(self._file.flush)

    def span(self, track: str, name: str, start_ns: int, end_ns: int, **details: Any) -> None:
        """Record a span, with times from `time.monotonic_ns`; spans of one track must not overlap."""
        self._write({"track": track, "name": name, "at": start_ns, "for": max(end_ns - start_ns, 0)} | details)

    def instant(self, track: str, name: str, **details: Any) -> None:
        """Record an event at the current time."""
        self._write({"track": track, "name": name, "at": time.monotonic_ns()} | details)

    def flush(self) -> None:
        """Write buffered lines to the file."""
        self._file.flush()
        self._flushed_ns = time.monotonic_ns()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        now = time.monotonic_ns()
        if now - self._flushed_ns > FLUSH_NS:
            self.flush()
