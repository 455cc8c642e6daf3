"""The time between the outcomes of a request, of which the drafter sees only when it had time to look."""

from __future__ import annotations

from vllm_ssd.drafter.sequence import Sequence
from vllm_ssd.policy import BranchBudget


class Windows:
    """Tells a budget of the time between two outcomes.

    Outcomes that are found together came while the drafter was busy, with a prompt for example. They share the time
    since the one before: taken one by one, all windows but the first would be next to nothing.
    """

    def __init__(self, budget: BranchBudget) -> None:
        self._budget = budget
        self._decided: list[Sequence] = []  # since the last `learn`

    def outcome(self, sequence: Sequence, now: float, num_rounds: int | None) -> None:
        """An outcome of `sequence`, of so many rounds, was found at `now`; None where that is not known."""
        if not sequence.num_rounds:
            self._decided.append(sequence)
        sequence.num_rounds += num_rounds or 1
        sequence.decided_at = now
        if num_rounds is None:
            sequence.window_from = 0.0

    def learn(self) -> None:
        """All outcomes that had come were found, and the drafter is about to be busy again."""
        for sequence in self._decided:
            if sequence.window_from:
                seconds = sequence.decided_at - sequence.window_from
                self._budget.observe_window(seconds / sequence.num_rounds)
            sequence.window_from, sequence.num_rounds = sequence.decided_at, 0
        self._decided.clear()
