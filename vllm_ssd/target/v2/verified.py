"""Drafts verified on the V2 runner, counted as vLLM's scheduler counts them."""

# Theory of operation
#
# vLLM counts a round when its scheduler takes the result, and throws the result away if the request has ended. With B
# batches under way at a time, the scheduler has taken the results of all steps up to s - B when it makes step s. A
# request whose end comes with step s ended in the result of step s - B: its later rounds are thrown away. So the round
# of step r is final once step r + B - 1 has been made. The results of a preempted request count, those under way
# included.
#
# Rounds come in the order of their steps; beside a GPU the scheduler may be steps further by then.

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from vllm_ssd.target.metrics import Metrics

Row = tuple[int, int, int, int]
"""Of one request in a round: serial number, drafts verified, those and the filler after them, drafts accepted."""


class VerifiedDrafts:
    """Counts the rounds of requests, known by serial number, once vLLM is sure to count them.

    num_batches: B, the most steps that the scheduler has under way; 1 where it waits for each result
    """

    def __init__(self, metrics: Metrics, num_batches: int) -> None:
        self._metrics = metrics
        self._num_batches = num_batches
        self._rounds: deque[tuple[int, list[Row]]] = deque()  # with their steps
        self._verifying: dict[int, int] = {}  # drafts in each request's coming round
        self._left: dict[int, tuple[int, int]] = {}  # the last step whose result counts, and the step of leaving
        self._step = 0  # the newest that is known to be made

    def take(self, step: int, serials: Sequence[int], scheduled: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """The round of `step`.

        Per request: its serial number, the drafts that vLLM counts in its row, and its row of `kernels.lookup`.
        """
        verifying, taken = self._verifying, []
        for serial, num_scheduled, row in zip(serials, scheduled, rows):
            if row[0] and serial >= 0:  # else its prompt goes on, or it is vLLM's own, to warm up
                taken.append((serial, min(verifying.get(serial, 0), num_scheduled), num_scheduled, row[0] - 1))
                verifying[serial] = row[4]
        self._rounds.append((step, taken))
        self._settle(step)

    def end(self, step: int, serials: Sequence[int]) -> None:
        """All requests whose end came with scheduler step `step`; called before `take` and `preempt` of that step."""
        for serial in serials:
            self._left[serial] = step - self._num_batches, step
        self._settle(step)

    def preempt(self, step: int, serial: int) -> None:
        """A request left its slot with scheduler step `step`, but its results under way count."""
        self._left[serial] = sys.maxsize, step

    def _settle(self, step: int) -> None:
        """Count the rounds that no later step takes back."""
        self._step = max(self._step, step)
        while self._rounds and self._rounds[0][0] <= self._step - self._num_batches + 1:
            settled, rows = self._rounds.popleft()
            if self._left:
                rows = [row for row in rows if row[0] not in self._left or settled <= self._left[row[0]][0]]
                self._forget(settled)
            offered = [row[1] for row in rows]
            filler = sum([row[2] for row in rows]) - sum(offered)
            self._metrics.accepted(offered, [row[3] for row in rows], filler)

    def _forget(self, settled: int) -> None:
        """Forget the requests that had no round after step `settled`."""
        for serial in [serial for serial, (_, left_at) in self._left.items() if left_at <= settled + 1]:
            del self._left[serial]
            self._verifying.pop(serial, None)
