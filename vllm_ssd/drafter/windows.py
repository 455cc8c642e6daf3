"""Measure the time between outcomes of a request, although the drafter only sees them between its steps."""

from __future__ import annotations

from vllm_ssd.drafter.sequence import Sequence
from vllm_ssd.policy import BranchBudget


class Windows:
    """Reports the time between two outcomes to a budget.

    Outcomes that are received together arrived while the drafter was busy, for example with a prompt. The time since
    the outcome before them is divided evenly: counted one by one, all windows but the first would be close to 0.
    """

    def __init__(self, budget: BranchBudget) -> None:
        self._budget = budget
        self._decided: list[Sequence] = []  # sequences with outcomes since the last `learn`

    def outcome(self, sequence: Sequence, now: float, num_rounds: int | None) -> None:
        """Record an outcome of `sequence` at time `now`; num_rounds: rounds that it covers, None if unknown."""
        if not sequence.num_rounds:
            self._decided.append(sequence)
        sequence.num_rounds += num_rounds or 1
        sequence.decided_at = now
        if num_rounds is None:
            sequence.window_from = 0.0

    def learn(self) -> None:
        """Report the windows of all recorded outcomes; call before the drafter becomes busy again."""
        for sequence in self._decided:
            if sequence.window_from:
                seconds = sequence.decided_at - sequence.window_from
                self._budget.observe_window(seconds / sequence.num_rounds)
            sequence.window_from, sequence.num_rounds = sequence.decided_at, 0
        self._decided.clear()
