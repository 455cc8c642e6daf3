"""Exact thinking budgets with speculation on vLLM's V1 runner.

vLLM (0.29 to 0.33) forces the end of reasoning with a state machine per request, which is correct for one token at a
time. With speculation it guesses from the number of drafts what a round will emit, and forces a wrong token, or none,
after a prompt that was prefilled in chunks (docs/limits.md). Here the same state machine steps through the committed
tokens one at a time, and a copy of it through the drafts, so that each position is forced as without speculation.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

FORCED_LOGIT = 1e9
"""Logit that vLLM gives a forced token."""


class ThinkingBudget(ThinkingBudgetStateHolder):
    """vLLM's holder of thinking budgets, exact for rounds of any number of drafts."""

    _forced: dict[int, list[int | None]]

    @classmethod
    def take_over(cls, holder: ThinkingBudgetStateHolder | None) -> None:
        """Convert vLLM's own holder, if there is one, to this class, keeping its state."""
        if type(holder) is ThinkingBudgetStateHolder:
            holder.__class__ = cls

    def sync_batch(self, batch_update: Any) -> None:
        """Follow requests that join, leave or move, and drop the budget of a row that another request moves to.

        vLLM would keep the budget of the finished request for a request without one that takes its row.
        """
        if batch_update:
            replaced = {to for _, to, direction in batch_update.moved if direction == MoveDirectionality.UNIDIRECTIONAL}
            added = {index for index, *_ in batch_update.added}
            for row in replaced - added:
                self._state.pop(row, None)
        super().sync_batch(batch_update)

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: torch.Tensor | None = None,
    ) -> None:
        """Advance each request by its emitted tokens, and determine the forced token after each of its drafts.

        output_token_ids: committed tokens per row; spec_token_ids: drafts under verification per row
        """
        self._forced = {}
        for row, state in self._state.items():
            output, drafts = output_token_ids[row], (spec_token_ids or [])[row : row + 1]
            seen = state.get("num_seen", len(output) - 1)  # a resumed request returns with all its tokens
            for length in range(seen + 1, len(output)):
                self._step(state, output[:length])
            forced = [self._step(state, output)]
            state["num_seen"] = len(output)
            trial, tokens = dict(state), list(output)
            for draft in drafts[0] if drafts else ():
                tokens.append(draft)
                forced.append(self._step(trial, list(tokens)))
            self._forced[row] = forced

    def apply_to_logits(
        self, logits: torch.Tensor, predict_bonus_token: bool, spec_token_ids: list[list[int]] | None
    ) -> torch.Tensor:
        """Force tokens in `logits`, which has one row per request for bonus tokens, else one row per draft."""
        rows, tokens = [], []
        if predict_bonus_token:
            for row, forced in self._forced.items():
                if forced[-1] is not None:
                    rows.append(row)
                    tokens.append(forced[-1])
        else:
            start = 0
            for row, drafts in enumerate(spec_token_ids or []):
                for position, token in enumerate(self._forced.get(row, ())[: len(drafts)]):
                    if token is not None:
                        rows.append(start + position)
                        tokens.append(token)
                start += len(drafts)
        if rows:
            index = torch.tensor([rows, tokens]).to(logits.device, non_blocking=True)
            logits.index_put_((index[0], index[1]), logits.new_full((len(rows),), FORCED_LOGIT))
        return logits

    def _step(self, state: dict[str, Any], output: list[int]) -> int | None:
        """Step the state machine after `output`, as without speculation; returns the forced token or None."""
        state |= {"output_tok_ids": output, "spec_token_ids": [], "force_index": [], "in_spec_mode": False}
        self._update_think_state(state)
        if state["in_end"] and state["force_index"] and state["end_count"] < len(self.think_end_token_ids):
            return self.think_end_token_ids[state["end_count"]]
        return None
