"""What was speculated for an outcome, read out of the blocks in the target's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.blocks import Blocks
from vllm_ssd.kernels.dispatch import require_contiguous, use_triton


@dataclass(frozen=True, slots=True)
class Speculation:
    """Up to `K` drafts for each of `R` requests, and the proposals they were drawn from.

    draft_token_ids [R, K] int32, -1 beyond the last; q_token_ids [R, K, M] int32 and q_probs [R, K, M] float32, 0
    beyond it; num_drafts [R] int32.
    """

    draft_token_ids: torch.Tensor
    q_token_ids: torch.Tensor
    q_probs: torch.Tensor
    num_drafts: torch.Tensor

    @classmethod
    def empty(cls, num_requests: int, num_drafts: int, top_m: int, device: torch.device | str) -> Speculation:
        """No drafts."""
        shape = (num_requests, num_drafts)
        return cls(
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.zeros(*shape, top_m, dtype=torch.int32, device=device),
            torch.zeros(*shape, top_m, device=device),
            torch.zeros(num_requests, dtype=torch.int32, device=device),
        )

    def __getitem__(self, rows: torch.Tensor) -> Speculation:
        """The speculations of some requests, in the order of `rows` [R'] int64."""
        fields = self.draft_token_ids, self.q_token_ids, self.q_probs, self.num_drafts
        return Speculation(*(field[rows] for field in fields))


@dataclass(frozen=True, slots=True)
class Found:
    """hits [R] bool: whether there is a draft; branches [R] int32: row in the block, N for the rest of the old
    speculation, -1 for neither; speculation: the drafts of the next round."""

    hits: torch.Tensor
    branches: torch.Tensor
    speculation: Speculation


def lookup(
    blocks: Blocks,
    slots: torch.Tensor,
    epochs: torch.Tensor,
    lengths: torch.Tensor,
    accept_lengths: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    old: Speculation,
) -> Found:
    """Look the outcomes of `R` requests up; one launch, no host.

    slots [R] int32: each request's place in `blocks`. epochs, lengths [R] int64: its epoch and the committed length at
    which the decided round began; a block of another epoch or length never matches. accept_lengths, bonus_token_ids
    [R] int32: the outcome. old: what had been speculated for that round, of which fewer may have been verified.

    When the bonus token is the next old draft (the scheduler had cut it off), the rest of the old speculation stands.
    Otherwise the newest whole block answers. A block that is overwritten during the read counts as a miss.
    """
    if not use_triton(blocks.headers):
        return _lookup_reference(blocks, slots, epochs, lengths, accept_lengths, bonus_token_ids, old)
    require_contiguous(slots, epochs, lengths, accept_lengths, bonus_token_ids)
    require_contiguous(old.draft_token_ids, old.q_token_ids, old.q_probs, old.num_drafts)
    num_branches, num_drafts, top_m = blocks.q_probs.shape[2:]
    found = Found(
        torch.empty_like(slots, dtype=torch.bool),
        torch.empty_like(slots),
        Speculation(
            torch.empty_like(old.draft_token_ids),
            torch.empty_like(old.q_token_ids),
            torch.empty_like(old.q_probs),
            torch.empty_like(old.num_drafts),
        ),
    )
    if len(slots):
        _lookup_kernel[(len(slots),)](
            blocks.headers,
            blocks.outcomes,
            blocks.depths,
            blocks.draft_token_ids,
            blocks.q_token_ids,
            blocks.q_probs,
            slots,
            epochs,
            lengths,
            accept_lengths,
            bonus_token_ids,
            old.draft_token_ids,
            old.q_token_ids,
            old.q_probs,
            old.num_drafts,
            found.hits,
            found.branches,
            found.speculation.draft_token_ids,
            found.speculation.q_token_ids,
            found.speculation.q_probs,
            found.speculation.num_drafts,
            N=num_branches,
            K=num_drafts,
            M=top_m,
            BLOCK_N=triton.next_power_of_2(num_branches),
            BLOCK_K=triton.next_power_of_2(num_drafts),
            BLOCK_KM=triton.next_power_of_2(num_drafts * max(top_m, 1)),
            num_warps=1,  # threads of several warps might read different headers
        )
    return found


def _lookup_reference(
    blocks: Blocks,
    slots: torch.Tensor,
    epochs: torch.Tensor,
    lengths: torch.Tensor,
    accept_lengths: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    old: Speculation,
) -> Found:
    num_branches, num_drafts = blocks.draft_token_ids.shape[2:]
    headers = blocks.headers[slots]
    whole = (headers[..., 1] == epochs[:, None]) & (headers[..., 2] == lengths[:, None]) & (headers[..., 0] % 2 == 0)
    version, half = torch.where(whole, headers[..., 0], -1).max(1)
    outcomes = torch.stack((accept_lengths, bonus_token_ids), 1)
    depths = blocks.depths[slots, half]
    match = (blocks.outcomes[slots, half] == outcomes[:, None]).all(2) & (depths > 0)
    row = match.int().argmax(1)
    token_ids = blocks.draft_token_ids[slots, half, row]
    q_token_ids, q_probs = blocks.q_token_ids[slots, half, row], blocks.q_probs[slots, half, row]
    unmoved = blocks.headers[slots, half, 0] == version
    is_hit = (match.any(1) & whole.any(1) & unmoved)[:, None]

    k, num_old = accept_lengths[:, None].long(), old.num_drafts[:, None]
    bonus_at, positions = k.clamp(max=num_drafts - 1), torch.arange(num_drafts, device=slots.device)
    is_rest = (k < num_old) & (old.draft_token_ids.gather(1, bonus_at) == bonus_token_ids[:, None])
    rest = (k + 1 + positions).clamp(max=num_drafts - 1)
    rest_q = rest[:, :, None].expand_as(old.q_probs)
    depth = torch.where(is_hit, depths.gather(1, row[:, None]), 0)
    num_found = torch.where(is_rest, num_old - k.int() - 1, depth)
    is_draft = positions < num_found
    is_q, is_rest_q = is_draft[:, :, None], is_rest[:, :, None]
    speculation = Speculation(
        torch.where(is_draft, torch.where(is_rest, old.draft_token_ids.gather(1, rest), token_ids), -1),
        torch.where(is_q, torch.where(is_rest_q, old.q_token_ids.gather(1, rest_q), q_token_ids), 0),
        torch.where(is_q, torch.where(is_rest_q, old.q_probs.gather(1, rest_q), q_probs), 0),
        num_found[:, 0],
    )
    branches = torch.where(is_rest, num_branches, torch.where(is_hit, row[:, None], -1))[:, 0].to(slots.dtype)
    return Found(speculation.num_drafts > 0, branches, speculation)


@triton.jit
def _lookup_kernel(
    headers_ptr,
    outcomes_ptr,
    depths_ptr,
    draft_token_ids_ptr,
    q_token_ids_ptr,
    q_probs_ptr,
    slots_ptr,
    epochs_ptr,
    lengths_ptr,
    accept_lengths_ptr,
    bonus_token_ids_ptr,
    old_draft_token_ids_ptr,
    old_q_token_ids_ptr,
    old_q_probs_ptr,
    old_num_drafts_ptr,
    hits_ptr,
    branches_ptr,
    found_draft_token_ids_ptr,
    found_q_token_ids_ptr,
    found_q_probs_ptr,
    found_num_drafts_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KM: tl.constexpr,
):
    """One program a request. What it gathers stays in registers until the version is seen not to have moved."""
    i = tl.program_id(0).to(tl.int64)
    k = tl.load(accept_lengths_ptr + i)
    bonus = tl.load(bonus_token_ids_ptr + i)
    num_old = tl.load(old_num_drafts_ptr + i)
    old_draft = tl.load(old_draft_token_ids_ptr + i * K + k, mask=k < num_old, other=-1)
    is_rest = (k < num_old) & (old_draft == bonus)

    # The newer whole block of this epoch and length. Atomic reads with acquire order at system scope: the writer may
    # be another stream, the host or another GPU.
    epoch = tl.load(epochs_ptr + i)
    length = tl.load(lengths_ptr + i)
    half = tl.load(slots_ptr + i).to(tl.int64) * 2
    header = headers_ptr + half * 3
    version = tl.atomic_add(header, 0, sem="acquire", scope="sys")
    other_version = tl.atomic_add(header + 3, 0, sem="acquire", scope="sys")
    usable = (version % 2 == 0) & (tl.load(header + 1, volatile=True) == epoch)
    usable = usable & (tl.load(header + 2, volatile=True) == length)
    other_usable = (other_version % 2 == 0) & (tl.load(header + 4, volatile=True) == epoch)
    other_usable = other_usable & (tl.load(header + 5, volatile=True) == length)
    if other_usable & ((other_version > version) | (usable == 0)):
        version = other_version
        half += 1
    usable = (usable | other_usable) & (is_rest == 0)

    row = tl.arange(0, BLOCK_N)
    at = half * N + row
    outcome = outcomes_ptr + at * 2
    in_block = (row < N) & usable
    depths = tl.load(depths_ptr + at, mask=in_block, other=0, cache_modifier=".cg")
    match = (
        (tl.load(outcome, mask=in_block, other=-1, cache_modifier=".cg") == k)
        & (tl.load(outcome + 1, mask=in_block, other=-1, cache_modifier=".cg") == bonus)
        & (depths > 0)
    )
    branch = tl.min(tl.where(match, row, N), 0)
    is_hit = branch < N
    depth = tl.sum(tl.where(row == branch, depths, 0), 0)
    num_drafts = tl.where(is_rest, num_old - k - 1, tl.where(is_hit, depth, 0))

    first = tl.where(is_rest, i * K + k + 1, (half * N + branch) * K)  # draft, of the old ones or of the block
    draft = tl.arange(0, BLOCK_K)
    from_old = is_rest & (draft < num_drafts)
    from_block = is_hit & (draft < num_drafts)
    token_ids = tl.load(draft_token_ids_ptr + first + draft, mask=from_block, other=-1, cache_modifier=".cg")
    token_ids = tl.where(from_old, tl.load(old_draft_token_ids_ptr + first + draft, mask=from_old), token_ids)
    if M > 0:
        entry = tl.arange(0, BLOCK_KM)
        old_entry = is_rest & (entry < num_drafts * M)
        block_entry = is_hit & (entry < num_drafts * M)
        at_entry = first * M + entry
        q_ids = tl.load(q_token_ids_ptr + at_entry, mask=block_entry, other=0, cache_modifier=".cg")
        q_ids = tl.where(old_entry, tl.load(old_q_token_ids_ptr + at_entry, mask=old_entry), q_ids)
        q_probs = tl.load(q_probs_ptr + at_entry, mask=block_entry, other=0.0, cache_modifier=".cg")
        q_probs = tl.where(old_entry, tl.load(old_q_probs_ptr + at_entry, mask=old_entry), q_probs)

    tl.debug_barrier()  # every thread has read what it reads of the block before one looks at the version again
    unmoved = tl.atomic_add(headers_ptr + half * 3, 0, sem="acq_rel", scope="sys") == version
    is_hit = is_hit & unmoved
    num_drafts = tl.where(is_rest | is_hit, num_drafts, 0)
    tl.store(hits_ptr + i, num_drafts > 0)
    tl.store(branches_ptr + i, tl.where(is_rest, N, tl.where(is_hit, branch, -1)))
    tl.store(found_num_drafts_ptr + i, num_drafts)
    token_ids = tl.where(draft < num_drafts, token_ids, -1)
    tl.store(found_draft_token_ids_ptr + i * K + draft, token_ids, mask=draft < K)
    if M > 0:
        q_ids = tl.where(entry < num_drafts * M, q_ids, 0)
        q_probs = tl.where(entry < num_drafts * M, q_probs, 0.0)
        tl.store(found_q_token_ids_ptr + i * K * M + entry, q_ids, mask=entry < K * M)
        tl.store(found_q_probs_ptr + i * K * M + entry, q_probs, mask=entry < K * M)
