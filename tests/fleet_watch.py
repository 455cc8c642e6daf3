"""What the drafters of a fleet do in a running engine, and when."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MAX_OVER_MS = 5
"""A call of V1's `propose` takes at most so much longer than it may wait for drafts."""


def assert_bounded(seen: SimpleNamespace, wait_ms: float) -> None:
    """No call of `propose` took longer than it may."""
    assert seen.proposed, "inconclusive: there was none"
    slowest_ms = 1e3 * max(seconds for _, seconds in seen.proposed)
    assert slowest_ms <= wait_ms + MAX_OVER_MS, f"{slowest_ms:.1f} ms, the longest of {len(seen.proposed)}"


class FleetWatch:
    """Records, with times of `time.perf_counter`:

    outcomes: (time, request, index of its drafter, whether it hit), for each outcome of a request that is held
    lost: (time, index, reason) of each drafter that was given up
    proposed: (time, seconds) of each call of V1's `propose`, without those in which its thread could have run and had
        no core; none on V2, where nothing waits
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
        started, delayed_s = time.perf_counter(), waited_for_core_s()
        try:
            return propose(batch)
        finally:
            seconds = time.perf_counter() - started - (waited_for_core_s() - delayed_s)
            self._seen.proposed.append((started, seconds))


def waited_for_core_s() -> float:
    """Seconds that this thread could have run so far and did not; 0 where the kernel does not count them."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0
