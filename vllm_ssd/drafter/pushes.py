"""Choose the new drafts that are due to be pushed, and build the push."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import cast

import numpy as np

from vllm_ssd.drafter.branches import JIT_ACCEPT_LENGTH, Branches
from vllm_ssd.drafter.sequence import Sequence
from vllm_ssd.link.protocol import JIT_TOKEN, Evicted, Push, SpeculationBlock, pack_ids
from vllm_ssd.policy import BranchBudget


def due_rows(branches: Branches, by_slot: SequenceOf[Sequence | None], budget: BranchBudget) -> np.ndarray:
    """Branches whose new drafts should be pushed now, [n] int64.

    A tree that will be complete before its outcome is expected is pushed once it is complete; one that may be late is
    pushed after every step.
    """
    depth = np.minimum(branches.computed, branches.num_drafts)
    rows = np.flatnonzero(branches.alive & (depth > branches.sent))
    if not len(rows):
        return rows
    owners = branches.owner[rows]
    now, due = time.perf_counter(), np.zeros(len(rows), bool)
    for slot in set(owners.tolist()):
        sequence = by_slot[slot]
        steps = branches.steps_left(sequence.rows) + (not sequence.is_computed)
        if not steps or sequence.awaited or not budget.in_time(now - sequence.decided_at, steps):
            due |= owners == slot
    return rows[due]


def take_push(
    branches: Branches, by_slot: SequenceOf[Sequence | None], rows: np.ndarray, evicted: list[Evicted]
) -> Push:
    """Build a push of the unsent drafts of `rows` and mark them as sent; branches of equal depths share a block."""
    depths = np.minimum(branches.computed[rows], branches.num_drafts[rows])
    groups: dict[tuple[int, int, int], list[int]] = {}
    for row, slot, offset, depth in zip(rows, branches.owner[rows], branches.sent[rows], depths):
        groups.setdefault((int(slot), int(offset), int(depth)), []).append(int(row))
    branches.sent[rows] = depths
    sequences = cast("SequenceOf[Sequence]", by_slot)  # a branch never outlives its sequence
    blocks: list[SpeculationBlock] = []
    q_token_ids: list[bytes] = []
    q_probs: list[bytes] = []
    for (slot, offset, depth), alike in groups.items():
        blocks.append(_block(branches, sequences[slot], alike, offset, depth))
        if blocks[-1].sampled:
            token_ids, probs = branches.q_token_ids[alike, offset:depth], branches.q_probs[alike, offset:depth]
            _put_drafts_first(branches.tokens[alike, offset + 1 : depth + 1], token_ids, probs)
            q_token_ids.append(pack_ids(token_ids))
            q_probs.append(probs.astype("<f4", copy=False).tobytes())
    support = branches.q_probs.shape[-1] if q_probs else 0
    return Push(blocks, evicted, None, support, b"".join(q_token_ids), b"".join(q_probs))


def _block(branches: Branches, sequence: Sequence, rows: list[int], offset: int, depth: int) -> SpeculationBlock:
    outcomes = np.stack([branches.accept_length[rows], branches.tokens[rows, 0]], axis=1)
    outcomes[outcomes[:, 0] == JIT_ACCEPT_LENGTH] = (0, JIT_TOKEN)
    return SpeculationBlock(
        sequence.request_id,
        sequence.epoch,
        sequence.length,
        offset,
        pack_ids(outcomes),
        pack_ids(branches.tokens[rows, offset + 1 : depth + 1]),
        sequence.temperature > 0,
    )


def _put_drafts_first(drafts: np.ndarray, token_ids: np.ndarray, probs: np.ndarray) -> None:
    """Swap each of `drafts` [n, d] to the front of its proposal in `token_ids` and `probs` [n, d, M], in place."""
    row = np.arange(drafts.size)
    for_draft = token_ids.reshape(len(row), -1)
    place = (for_draft == drafts.reshape(-1, 1)).argmax(1)
    for array in (for_draft, probs.reshape(len(row), -1)):
        firsts = array[:, 0].copy()
        array[:, 0] = array[row, place]
        array[row, place] = firsts
