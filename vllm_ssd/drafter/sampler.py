"""Draw the next token of each branch on the host, from a forward's logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_ssd.drafter.noise import Unranked
from vllm_ssd.drafter.sequence import Candidates
from vllm_ssd.drafter.truncation import truncate
from vllm_ssd.policy import saguaro


@dataclass(slots=True)
class Draw:
    """The tokens drawn after each logits row.

    candidates [n, C] int32: likeliest bonus tokens first; candidate_probs [n, C] float32: softmax of their scores,
    which are logits at the row's temperature (1 for greedy rows) plus the target's noise where it is known; drawn [n]:
    the drawn token; draft_probs [n] float32: its softmax among the C likeliest tokens, noise aside, or that of the last
    of them; q_token_ids, q_probs [n, M]: the proposal it was drawn from.
    """

    candidates: np.ndarray
    candidate_probs: np.ndarray
    drawn: np.ndarray
    draft_probs: np.ndarray
    q_token_ids: np.ndarray | None  # None when every row is greedy
    q_probs: np.ndarray | None
    unranked: Unranked | None = None  # of all rows, [n, NUM_UNRANKED] each

    def candidates_of(self, row: int) -> Candidates:
        """What is known of the bonus token after one of the rows."""
        unranked = None if self.unranked is None else Unranked(*(values[row] for values in self.unranked))
        drawn = int(self.drawn[row]), float(self.draft_probs[row])
        return Candidates(self.candidates[row], self.candidate_probs[row], *drawn, unranked)


class Sampler:
    """Draws the next token after each logits row, with randomness that is independent of verification's."""

    def __init__(self, num_candidates: int, top_m: int, seed: int, saguaro_c: float = 1.0) -> None:
        self._num_candidates = num_candidates
        self._top_m = top_m
        self._saguaro_c = saguaro_c
        self._generator = torch.Generator().manual_seed(seed)

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: np.ndarray,
        fan_out: np.ndarray | None = None,
        truncations: np.ndarray | None = None,
        noise: torch.Tensor | None = None,
        num_unranked: int = 0,
    ) -> Draw:
        """Draw tokens after `logits` [n, vocab] at `temperatures` [n] float32, 0 for greedy rows.

        Greedy rows take the likeliest token. Other rows draw from exactly the proposal q: the softmax at their
        temperature over the `top_m` likeliest tokens, truncated by `truncations` [n, 3] (see `truncate`; default:
        none), with the first `fan_out` [n] tokens weighted by `saguaro_c` (default: none), renormalised.

        noise [n, vocab] float32: with which the target draws, 0 where it is unknown; it only ranks candidates
        num_unranked: how many of the likeliest tokens to return as `Unranked`
        """
        num_candidates, top_m = self._num_candidates, self._top_m
        if not temperatures.any():
            values, indices = torch.topk(logits, num_candidates, dim=-1)
            ids, probs = indices.cpu().numpy(), torch.softmax(values.float(), dim=-1).cpu().numpy()
            return Draw(ids.astype(np.int32), probs, ids[:, 0], probs[:, 0], None, None)
        num_unranked = min(num_unranked, logits.shape[1])
        values, indices = torch.topk(logits.float(), max(num_candidates, top_m, num_unranked), dim=-1)
        divisor = torch.from_numpy(np.where(temperatures > 0, temperatures, np.float32(1)))
        values = values.cpu() / divisor[:, None]
        candidate_probs = torch.softmax(values[:, :num_candidates], dim=-1)
        q_probs = torch.softmax(values[:, :top_m], dim=-1)
        if truncations is not None:
            q_probs = torch.from_numpy(truncate(q_probs.numpy(), truncations))
        if fan_out is not None:
            q_probs = torch.from_numpy(saguaro(q_probs.numpy(), fan_out, self._saguaro_c))
        choice = torch.multinomial(q_probs, 1, generator=self._generator)[:, 0].numpy()
        choice = np.where(temperatures > 0, choice, 0)
        ids, rows = indices.cpu().numpy(), np.arange(len(indices))
        unranked = None
        if num_unranked:
            unranked = Unranked(ids[:, :num_unranked].astype(np.int32), values[:, :num_unranked].numpy())
        draft_probs = candidate_probs.numpy()[rows, np.minimum(choice, num_candidates - 1)]
        candidates = ids[:, :num_candidates]
        if noise is not None:
            scores = torch.add(noise.to(logits.device), logits.float() / divisor.to(logits.device)[:, None])
            values, indices = torch.topk(scores, num_candidates, dim=-1)
            candidates, candidate_probs = indices.cpu().numpy(), torch.softmax(values, dim=-1).cpu()
        return Draw(
            candidates.astype(np.int32),
            candidate_probs.numpy(),
            ids[rows, choice],
            draft_probs,
            ids[:, :top_m].astype(np.int32),
            q_probs.numpy(),
            unranked,
        )
