"""Count the drafts verified on the V2 runner in the same way as vLLM's scheduler."""

# Theory of operation
#
# vLLM counts a round when its scheduler processes the result, and discards the result if the request has ended. With B
# batches in flight, the scheduler has processed the results of all steps up to s - B when it makes step s. A request
# whose end comes with step s ended in the result of step s - B, so its later rounds are discarded. Hence the round of
# step r is final once step r + B - 1 has been made. All results of a preempted request count, including those in
# flight.
#
# Rounds arrive in the order of their steps; with a GPU the scheduler may be several steps ahead by then.

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from vllm_ssd.target.metrics import Metrics

Row = tuple[int, int, int, int]
"""A request in a round: serial number, drafts verified, drafts and filler verified, drafts accepted."""


class VerifiedDrafts:
    """Counts a request's rounds once it is certain that vLLM counts them.

    num_batches: B, the most scheduler steps in flight; 1 if it waits for each result
    """

    def __init__(self, metrics: Metrics, num_batches: int) -> None:
        self._metrics = metrics
        self._num_batches = num_batches
        self._rounds: deque[tuple[int, list[Row]]] = deque()  # (step, rows) of rounds that are not final yet
        self._verifying: dict[int, int] = {}  # drafts in each request's next round
        self._left: dict[int, tuple[int, int]] = {}  # (last step whose result counts, step of leaving) by request
        self._step = 0  # newest step that is known to have been made

    def take(self, step: int, serials: Sequence[int], scheduled: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """Take the round of `step`.

        serials, scheduled, rows [B]: each request's serial number, the drafts that vLLM counts in its row, and its row
        of `kernels.lookup`
        """
        verifying, taken = self._verifying, []
        for serial, num_scheduled, row in zip(serials, scheduled, rows):
            if row[0] and serial >= 0:  # neither in prefill nor a warm-up row of vLLM's own
                taken.append((serial, min(verifying.get(serial, 0), num_scheduled), num_scheduled, row[0] - 1))
                verifying[serial] = row[4]
        self._rounds.append((step, taken))
        self._settle(step)

    def end(self, step: int, serials: Sequence[int]) -> None:
        """The requests `serials` ended with scheduler step `step`; call before `take` and `preempt` of that step."""
        for serial in serials:
            self._left[serial] = step - self._num_batches, step
        self._settle(step)

    def preempt(self, step: int, serial: int) -> None:
        """A request was preempted with scheduler step `step`; its results in flight still count."""
        self._left[serial] = sys.maxsize, step

    def _settle(self, step: int) -> None:
        """Count the rounds that are final now that `step` has been made."""
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
        """Forget requests that left by step `settled` + 1, so that no later round can be theirs."""
        for serial in [serial for serial, (_, left_at) in self._left.items() if left_at <= settled + 1]:
            del self._left[serial]
            self._verifying.pop(serial, None)
