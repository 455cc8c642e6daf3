"""Faults of vLLM without speculation that are repaired where a text is compared with the target alone.

Importing this mends them for vLLM's own classes; `docs/limits.md` tells what they are.
"""

from __future__ import annotations

from vllm.v1.sample import thinking_budget_state
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

REPAIRED = True
"""Named in an engine's `patches`, so that its process imports this module."""

sync_batch = thinking_budget_state.ThinkingBudgetStateHolder.sync_batch


def forget_the_budgets_of_finished_requests(self, batch_update) -> None:
    """A request without a budget that takes the row of a finished one would inherit its budget."""
    if batch_update:
        added = {index for index, *_ in batch_update.added}
        for _, row, direction in batch_update.moved:
            if direction == MoveDirectionality.UNIDIRECTIONAL and row not in added:
                self._state.pop(row, None)
    sync_batch(self, batch_update)


thinking_budget_state.ThinkingBudgetStateHolder.sync_batch = forget_the_budgets_of_finished_requests
