"""What the drafters of a fleet do in a running engine, and when."""

from __future__ import annotations

import functools
import os
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

MAX_OVER_S = 5e-3
"""A call of V1's `propose` takes at most so much longer than it may wait for drafts."""


class Call(NamedTuple):
    """A call of V1's `propose`, in seconds. What a busy machine adds to it is counted apart:

    delayed: its thread could have run and had no core
    held_up: other threads of the process had none, or another process of its own was being started: meanwhile they may
        have had the interpreter, or a lock
    """

    seconds: float
    delayed: float
    held_up: float
    cpu: float

    @property
    def own(self) -> float:
        """What is left on a machine that has a core for each thread."""
        return self.seconds - self.delayed - self.held_up


def assert_bounded(seen: SimpleNamespace, wait_ms: float) -> None:
    """No call of `propose` took longer than it may, nor did nineteen of twenty where nobody held them up."""
    assert seen.proposed, "inconclusive: there was none"
    bound = wait_ms / 1e3 + MAX_OVER_S
    longest = max(seen.proposed, key=lambda call: call.own)
    assert longest.own <= bound, f"{longest}, of {len(seen.proposed)}"
    undelayed = sorted(call.seconds - call.delayed for call in seen.proposed)
    assert undelayed[(len(undelayed) - 1) * 19 // 20] <= bound, undelayed


class FleetWatch:
    """Records, with times of `time.perf_counter`:

    outcomes: (time, request, index of its drafter, whether it hit), for each outcome of a request that is held
    lost: (time, index, reason) of each drafter that was given up
    proposed: a `Call` for each call of V1's `propose`; none on V2, where nothing waits
    """

    def __init__(self, proposer: Any) -> None:
        self._seen = self._nothing()
        verifier = getattr(proposer, "_verifier", None)
        client = proposer._courier._client if verifier is None else verifier._client
        looked_up = client.looked_up

        def watched(request: Any, *, hit: bool, block: bool) -> None:
            self._seen.outcomes.append((time.perf_counter(), request.request_id, request.member, hit))
            looked_up(request, hit=hit, block=block)

        client.looked_up = watched
        for index, link in enumerate(proposer._drafters):
            link._lose = functools.partial(self._lose, index, link._lose)
        if verifier is not None:
            self._watch_starts()
            verifier.propose = functools.partial(self._propose, verifier.propose)

    def take(self) -> SimpleNamespace:
        """What was recorded since the last call."""
        seen, self._seen = self._seen, self._nothing()
        return seen

    def _nothing(self) -> SimpleNamespace:
        return SimpleNamespace(outcomes=[], lost=[], proposed=[])

    def _lose(self, index: int, lose: Any, drafter: Any, reason: str) -> None:
        if not drafter.lost:
            self._seen.lost.append((time.perf_counter(), index, reason))
        lose(drafter, reason)

    def _propose(self, propose: Any, batch: Any) -> list[list[int]]:
        others, ours = other_threads(), f"/proc/self/task/{threading.get_native_id()}"
        before = {thread: waited_for_core_s(thread) for thread in others}
        delayed, cpu, started = waited_for_core_s(ours), time.thread_time(), time.perf_counter()
        try:
            return propose(batch)
        finally:
            ended = time.perf_counter()
            delayed, cpu = waited_for_core_s(ours) - delayed, time.thread_time() - cpu
            held_up = sum(max(0.0, waited_for_core_s(thread) - before.get(thread, 0.0)) for thread in other_threads())
            held_up += sum(max(0.0, min(end, ended) - max(begin, started)) for begin, end in self._starts)
            self._seen.proposed.append(Call(ended - started, delayed, held_up, cpu))

    def _watch_starts(self) -> None:
        """Note when this process starts others: its threads stand still until a new one has had a core to begin on."""
        fork_exec = subprocess._fork_exec
        self._starts: deque[tuple[float, float]] = deque(maxlen=8)

        def watched(*args: Any) -> int:
            begin = time.perf_counter()
            try:
                return fork_exec(*args)
            finally:
                self._starts.append((begin, time.perf_counter()))

        subprocess._fork_exec = watched


def other_threads() -> list[str]:
    """Folders of this process's other threads."""
    own = str(threading.get_native_id())
    return [f"/proc/self/task/{thread}" for thread in os.listdir("/proc/self/task") if thread != own]


def waited_for_core_s(thread: str) -> float:
    """Seconds that a thread could have run so far and did not; 0 where the kernel does not count them, or it ended."""
    try:
        return int(Path(f"{thread}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0
