"""Read the timelines of target and drafters, and convert them to Chrome trace events."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_ssd.link.timeline import timeline_path

TRACKS = ("target", "waits", "rounds", "pushes", "drafter")
"""Tracks in display order; each is a row of the viewer."""


@dataclass(slots=True)
class Event:
    """A span, or an instant if `length_ns` is None."""

    pid: int
    side: str
    track: str
    name: str
    at_ns: int
    length_ns: int | None
    details: dict[str, Any] = field(default_factory=dict)


def read(trace: Path) -> list[Event]:
    """Read the events of all processes of a trace, oldest first.

    Raises ValueError if there are none, or for an invalid file. An incomplete last line, of a killed process, is
    ignored.
    """
    events: list[Event] = []
    pattern = glob.escape(str(trace)) + timeline_path("", "*", 0).replace(".0.", ".*.")
    for path in sorted(glob.glob(pattern)):
        lines = Path(path).read_text().split("\n")
        side, pid = "", 0
        for number, line in enumerate(lines[:-1], start=1):
            try:
                found = json.loads(line)
                if "process" in found:
                    side, pid = found["process"], int(found["pid"])
                    continue
                track, name, at = found.pop("track"), found.pop("name"), int(found.pop("at"))
                length = found.pop("for", None)
                events.append(Event(pid, side, track, name, at, None if length is None else int(length), found))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a timeline event ({error})") from None
    if not events:
        raise ValueError(f"no timeline next to {trace}: nothing was recorded with VLLM_SSD_TRACE={trace}")
    return sorted(events, key=lambda event: event.at_ns)


def chrome_trace(events: list[Event]) -> dict[str, Any]:
    """Convert to Chrome's trace event format, for Perfetto and chrome://tracing; times in µs from the first event."""
    first = events[0].at_ns
    found: list[dict[str, Any]] = []
    for pid, side in sorted({(event.pid, event.side) for event in events}):
        found.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": f"{side} {pid}"}})
        order = 0 if side == "target" else 1
        found.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": order}})
    for pid, track in sorted({(event.pid, event.track) for event in events}):
        tid = _tid(track)
        found.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
    for event in events:
        entry = {
            "name": event.details.get("fate", event.name),
            "cat": event.track,
            "pid": event.pid,
            "tid": _tid(event.track),
            "ts": (event.at_ns - first) / 1e3,
            "args": event.details,
        }
        if event.length_ns is None:
            found.append(entry | {"ph": "i", "s": "t"})
        else:
            found.append(entry | {"ph": "X", "dur": event.length_ns / 1e3})
    return {"traceEvents": found, "displayTimeUnit": "ms", "otherData": {"clock": "CLOCK_MONOTONIC"}}


def _tid(track: str) -> int:
    """A number for each track, in the order of TRACKS; "waits 2" is the track of the third drafter."""
    name, _, index = track.partition(" ")
    return (TRACKS.index(name) if name in TRACKS else len(TRACKS)) + 1 + (len(TRACKS) + 1) * int(index or 0)


@dataclass(slots=True)
class Round:
    """One round of a request: what it verified, and the lookup of its outcome.

    grown: branches that existed when the outcome was known; fate: origin of the next drafts, as in `target.trace`
    """

    at_ns: int
    length: int
    verified: int
    accepted: int
    emitted: int
    fate: str
    drafts: int
    grown: int


def rounds(events: list[Event]) -> dict[str, list[Round]]:
    """Rounds by request, in the order in which requests opened; reused request ids are numbered."""
    found: dict[str, list[Round]] = {}
    current: dict[str, str] = {}
    for event in events:
        if event.track != "rounds":
            continue
        request = event.details.get("request", "")
        if event.name == "close":
            current.pop(request, None)
        elif request not in current:
            count = sum(key == request or key.startswith(f"{request} (") for key in found)
            current[request] = f"{request} ({count + 1})" if count else request
            found[current[request]] = []
        if event.name == "round" and request in current:
            d = event.details
            found[current[request]].append(
                Round(
                    event.at_ns,
                    d["length"],
                    d["verified"],
                    d["accepted"],
                    d["emitted"],
                    d["fate"],
                    d["drafts"],
                    d["branches"],
                )
            )
    return {request: list_ for request, list_ in found.items() if list_}
