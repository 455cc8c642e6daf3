"""From spines and branches to one ragged forward, and from its logits to drawn tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from vllm_ssd.compat.paged import ForwardBatch
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.sequence import NO_ROWS, Sequence


def build_batch(
    tables: np.ndarray, branches: Branches, spines: SequenceOf[tuple[Sequence, int]], rows: np.ndarray
) -> tuple[ForwardBatch, list[tuple[Sequence, int]]]:
    """The forward of the next `n` tokens of each spine and the next token of each branch in `rows`.

    tables [slots, P] int32: pages of every spine. Also returns (sequence, token index) of each spine logit, which
    come before those of `rows`; spine tokens before the last committed one need none.
    """
    page_size = branches.page_size
    token_ids: list[int] = []
    positions: list[np.ndarray] = [NO_ROWS]
    logit_indices: list[int] = []
    spine_logits: list[tuple[Sequence, int]] = []
    for sequence, n in spines:
        start = sequence.computed
        for position in range(max(start, sequence.length - 1), start + n):
            logit_indices.append(len(token_ids) + position - start)
            spine_logits.append((sequence, position))
        token_ids.extend(sequence.tokens[start : start + n])
        positions.append(np.arange(start, start + n))
    query_lens = np.array([n for _, n in spines], np.int64)
    slots = np.array([s.slot for s, _ in spines], np.int64)
    spine_positions = np.concatenate(positions)
    spine_pages = tables[np.repeat(slots, query_lens), spine_positions // page_size].astype(np.int64)

    step = branches.computed[rows]
    row_positions = branches.base[rows] + step
    first_page = branches.base[rows] // page_size
    own_pages = branches.pages[rows]
    row_pages = own_pages[np.arange(len(rows)), row_positions // page_size - first_page].astype(np.int64)

    all_positions = np.concatenate([spine_positions, row_positions])
    width = int(all_positions.max()) // page_size + own_pages.shape[1]
    page_tables = np.ascontiguousarray(tables[np.concatenate([slots, branches.owner[rows]]), :width])
    columns = first_page[:, None] + np.arange(own_pages.shape[1])
    np.put_along_axis(page_tables[len(spines) :], columns, own_pages, axis=1)
    num_spine_tokens = len(token_ids)
    batch = ForwardBatch(
        token_ids=np.concatenate([np.array(token_ids, np.int64), branches.tokens[rows, step]]),
        positions=all_positions,
        slots=np.concatenate([spine_pages, row_pages]) * page_size + all_positions % page_size,
        query_start_loc=np.concatenate(
            [[0], np.cumsum(query_lens), num_spine_tokens + 1 + np.arange(len(rows))]
        ).astype(np.int32),
        seq_lens=np.array([s.computed + n for s, n in spines] + (row_positions + 1).tolist(), np.int32),
        page_tables=page_tables,
        logit_indices=np.concatenate(
            [np.array(logit_indices, np.int64), num_spine_tokens + np.arange(len(rows), dtype=np.int64)]
        ),
    )
    return batch, spine_logits


@dataclass(slots=True)
class Draw:
    """Tokens drawn after each logits row: ids [n, C] likeliest first, drawn [n], q ids and probs [n, M]."""

    candidates: np.ndarray
    drawn: np.ndarray
    q_token_ids: np.ndarray | None  # None when every row is greedy
    q_probs: np.ndarray | None


class Sampler:
    """Draws the next token after each logits row, with randomness that verification never sees."""

    def __init__(self, num_candidates: int, top_m: int, seed: int) -> None:
        self._num_candidates = num_candidates
        self._top_m = top_m
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, logits: torch.Tensor, temperatures: np.ndarray) -> Draw:
        """Tokens after `logits` [n, vocab] at `temperatures` [n] float32, 0 for greedy rows.

        Greedy rows take the likeliest token. Others draw from the softmax at their temperature over the `top_m`
        likeliest tokens: that cut, renormalised distribution is the proposal q, exactly.
        """
        num_candidates, top_m = self._num_candidates, self._top_m
        if not temperatures.any():
            ids = torch.topk(logits, num_candidates, dim=-1).indices.cpu().numpy()
            return Draw(ids.astype(np.int32), ids[:, 0], None, None)
        values, indices = torch.topk(logits.float(), max(num_candidates, top_m), dim=-1)
        divisor = torch.from_numpy(np.where(temperatures > 0, temperatures, np.float32(1)))
        q_probs = torch.softmax(values[:, :top_m].cpu() / divisor[:, None], dim=-1)
        choice = torch.multinomial(q_probs, 1, generator=self._generator)[:, 0].numpy()
        choice = np.where(temperatures > 0, choice, 0)
        ids = indices.cpu().numpy()
        return Draw(
            ids[:, :num_candidates].astype(np.int32),
            ids[np.arange(len(ids)), choice],
            ids[:, :top_m].astype(np.int32),
            q_probs.numpy(),
        )
