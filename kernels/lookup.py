"""Look up an outcome's drafts in the blocks in the target's device memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.blocks import DeviceBlocks
from vllm_ssd.kernels.dispatch import power_of_2, require_contiguous, use_triton

OUTCOME_COLUMNS = 6
"""Columns of `lookup`'s outcomes before the drafts."""


class Found(IntEnum):
    """The result of looking up an outcome."""

    LATE = 0  # no block for its round has arrived
    MISS = 1  # not in the block
    HIT = 2  # drafts were found


@dataclass(frozen=True, slots=True)
class DeviceSpeculation:
    """Up to `K` drafts for each of `S` requests, and the proposals they were drawn from.

    draft_token_ids [S, K] int32, -1 beyond the last; num_drafts [S] int32; q_token_ids [S, K, M] int32 and
    q_probs [S, K, M] float32, undefined beyond the last draft and for greedy requests.
    """

    draft_token_ids: torch.Tensor
    q_token_ids: torch.Tensor
    q_probs: torch.Tensor
    num_drafts: torch.Tensor

    @classmethod
    def empty(cls, num_requests: int, num_drafts: int, top_m: int, device: torch.device | str) -> DeviceSpeculation:
        """No drafts."""
        shape = (num_requests, num_drafts)
        return cls(
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.zeros(*shape, top_m, dtype=torch.int32, device=device),
            torch.zeros(*shape, top_m, device=device),
            torch.zeros(num_requests, dtype=torch.int32, device=device),
        )


def lookup(
    blocks: DeviceBlocks,
    verifying: DeviceSpeculation,
    slots: torch.Tensor,
    num_sampled: torch.Tensor,
    epochs: torch.Tensor,
    total_lens: torch.Tensor,
    last_sampled: torch.Tensor,
    temperatures: torch.Tensor,
    wanted: int,
    drafts: torch.Tensor,
    outcomes: torch.Tensor,
    ngram: torch.Tensor | None = None,
) -> None:
    """Replace the verified drafts of `B` requests by the drafts for their outcomes.

    slots [B] int64: slot of each request, negative for padding; num_sampled [B] int32: tokens emitted by its round, 0
    during prefill. Indexed by slot: epochs [S] int64; total_lens [S] int32, including the emitted tokens; last_sampled
    [S] int64, the last emitted token; temperatures [S] float32; `blocks`; and `verifying`, whose rows of these requests
    are replaced (vLLM may have verified fewer of the old drafts than it contains).

    If the last token is the next old draft, which the scheduler had cut off, the rest of the old drafts stays valid.
    Otherwise the drafts come from the newest complete block with the request's epoch and the length at which the round
    began; a block that is overwritten during the read counts as a miss. At a temperature above 0, drafts without q are
    ignored. At most `wanted` drafts are taken.

    ngram [B, K] int64: n-gram drafts of the requests that emitted something. Where a request has n < `wanted` drafts,
    equal to its first n n-gram drafts (n may be 0), the next ones follow with one-hot q, up to `wanted` drafts in all.

    drafts [>= B, 1 + K] int64: receives the number of drafts and the drafts, then the last token as filler
    outcomes [>= B, 6 + K] int32: receives num_sampled, the last token, `Found`, the branch (row in the block, N for the
    rest of the old drafts, -1 for neither), the number of drafts, how many of them come before its n-gram drafts, and
    the drafts, -1 beyond the last; may be in pinned host memory

    In place, one launch, without host synchronisation.
    """
    num_branches, num_drafts, top_m = blocks.q_probs.shape[2:]
    wanted = min(wanted, num_drafts)
    if not use_triton(blocks.headers):
        _lookup_reference(
            blocks,
            verifying,
            slots,
            num_sampled,
            epochs,
            total_lens,
            last_sampled.flatten(),
            temperatures,
            wanted,
            drafts,
            outcomes,
            ngram,
        )
        return
    require_contiguous(slots, num_sampled, epochs, total_lens, last_sampled, temperatures, drafts, outcomes)
    if ngram is not None:
        require_contiguous(ngram)
    if len(slots):
        _lookup_kernel[(len(slots),)](
            blocks.headers,
            blocks.outcomes,
            blocks.depths,
            blocks.draft_token_ids,
            blocks.q_token_ids,
            blocks.q_probs,
            verifying.draft_token_ids,
            verifying.q_token_ids,
            verifying.q_probs,
            verifying.num_drafts,
            slots,
            num_sampled,
            epochs,
            total_lens,
            last_sampled,
            temperatures,
            wanted,
            drafts,
            outcomes,
            ngram,
            N=num_branches,
            K=num_drafts,
            M=top_m,
            BLOCK_N=power_of_2(num_branches),
            BLOCK_K=power_of_2(num_drafts),
            BLOCK_KM=min(512, power_of_2(num_drafts * max(top_m, 1))),
            num_warps=1,  # threads of several warps might read different headers
        )


def _lookup_reference(
    blocks: DeviceBlocks,
    verifying: DeviceSpeculation,
    slots: torch.Tensor,
    num_sampled: torch.Tensor,
    epochs: torch.Tensor,
    total_lens: torch.Tensor,
    last_sampled: torch.Tensor,
    temperatures: torch.Tensor,
    wanted: int,
    drafts: torch.Tensor,
    outcomes: torch.Tensor,
    ngram: torch.Tensor | None,
) -> None:
    num_branches, num_drafts = blocks.draft_token_ids.shape[2:]
    drafts[: len(slots)], outcomes[: len(slots)] = 0, 0
    rows = (slots >= 0).nonzero().flatten()
    slots, num_sampled = slots[rows], num_sampled[rows].long()
    decided, k = num_sampled > 0, num_sampled - 1
    last, lengths = last_sampled[slots], total_lens[slots] - num_sampled

    headers = blocks.headers[slots]
    answers = (headers[..., 1] == epochs[slots, None]) & (headers[..., 2] == lengths[:, None])
    whole = answers & (headers[..., 0] % 2 == 0)
    half = torch.where(whole, headers[..., 0], -1).argmax(1)
    depths = blocks.depths[slots, half]
    match = (blocks.outcomes[slots, half] == torch.stack((k, last), 1)[:, None]).all(2) & (depths > 0)
    branch = match.int().argmax(1)

    positions = torch.arange(num_drafts, device=slots.device)
    num_old, old_token_ids = verifying.num_drafts[slots], verifying.draft_token_ids[slots]
    next_old = old_token_ids.gather(1, k.clamp(0, num_drafts - 1)[:, None])[:, 0]
    is_rest = decided & (k < num_old) & (next_old == last)
    is_hit = decided & whole.any(1) & match.any(1) & ~is_rest
    rest = (k[:, None] + 1 + positions).clamp(max=num_drafts - 1)
    num_found = torch.where(is_rest, num_old - k - 1, 0)
    num_found = torch.where(is_hit, depths.gather(1, branch[:, None])[:, 0], num_found)

    def found(of_blocks: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        old = old[slots[:, None], rest]
        return torch.where(is_rest.view(-1, *[1] * (old.ndim - 1)), old, of_blocks[slots, half, branch])

    token_ids = found(blocks.draft_token_ids, verifying.draft_token_ids)
    q_token_ids = found(blocks.q_token_ids, verifying.q_token_ids)
    q_probs = found(blocks.q_probs, verifying.q_probs)
    is_sampled = temperatures[slots] > 0
    num_found = torch.where(is_sampled & ~(q_probs[:, 0, :1] > 0).any(1), 0, num_found)
    branches = torch.where(is_rest, num_branches, branch).where(num_found > 0, -1)
    answered = torch.where(num_found > 0, Found.HIT, Found.MISS)
    taken = num_drafted = num_found.clamp(max=wanted)
    if ngram is not None:
        beyond = positions >= num_drafted[:, None]
        agree = decided & (beyond | (token_ids == ngram[rows])).all(1)
        taken = torch.where(agree, wanted, num_drafted)
        token_ids = torch.where(beyond, ngram[rows], token_ids).int()
        q_token_ids = torch.where(beyond[:, :, None], token_ids[:, :, None], q_token_ids)
        one_hot = torch.arange(q_probs.shape[2], device=slots.device) == 0
        q_probs = torch.where(beyond[:, :, None], one_hot.float(), q_probs)

    is_draft = positions < taken[:, None]
    drafts[rows] = torch.cat((taken[:, None], torch.where(is_draft, token_ids, last[:, None])), 1)
    token_ids = torch.where(is_draft, token_ids, -1)
    columns = (num_sampled, last, torch.where(answers.any(1), answered, Found.LATE), branches, taken, num_drafted)
    outcomes[rows] = torch.cat((torch.stack(columns, 1), token_ids), 1).int()
    verifying.num_drafts[slots] = taken.int()
    verifying.draft_token_ids[slots] = token_ids
    verifying.q_token_ids[slots[is_sampled]] = q_token_ids[is_sampled]
    verifying.q_probs[slots[is_sampled]] = q_probs[is_sampled]


# Avoid specialised variants for wanted == 1 and for unaligned tensors, which would be compiled while a request waits;
# these arguments are read one number at a time anyway.
@triton.jit(
    do_not_specialize=["wanted"],
    do_not_specialize_on_alignment=[
        "slots_ptr",
        "num_sampled_ptr",
        "epochs_ptr",
        "total_lens_ptr",
        "last_sampled_ptr",
        "temperatures_ptr",
    ],
)
def _lookup_kernel(
    headers_ptr,
    outcomes_ptr,
    depths_ptr,
    draft_token_ids_ptr,
    q_token_ids_ptr,
    q_probs_ptr,
    verifying_token_ids_ptr,
    verifying_q_token_ids_ptr,
    verifying_q_probs_ptr,
    verifying_num_drafts_ptr,
    slots_ptr,
    num_sampled_ptr,
    epochs_ptr,
    total_lens_ptr,
    last_sampled_ptr,
    temperatures_ptr,
    wanted,
    out_drafts_ptr,
    out_outcomes_ptr,
    ngram_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KM: tl.constexpr,
):
    """One program a request. No draft counts until the version of the block it came from is seen not to have moved."""
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + i).to(tl.int64)
    draft = tl.arange(0, BLOCK_K)
    out_drafts_ptr += i * (K + 1)
    out_outcomes_ptr += i * (K + 6)
    if slot < 0:
        tl.store(out_drafts_ptr, tl.zeros((), tl.int64))
        tl.store(out_drafts_ptr + 1 + draft, tl.zeros((BLOCK_K,), tl.int64), mask=draft < K)
        column = tl.arange(0, 8)
        tl.store(out_outcomes_ptr + column, tl.zeros((8,), tl.int32), mask=column < 6)
        tl.store(out_outcomes_ptr + 6 + draft, tl.zeros((BLOCK_K,), tl.int32), mask=draft < K)
        return
    num_sampled = tl.load(num_sampled_ptr + i).to(tl.int32)
    last = tl.load(last_sampled_ptr + slot).to(tl.int32)
    is_sampled = tl.load(temperatures_ptr + slot) > 0
    decided = num_sampled > 0
    k = num_sampled - 1
    num_old = tl.load(verifying_num_drafts_ptr + slot)
    is_old = decided & (k < num_old)
    is_rest = is_old & (tl.load(verifying_token_ids_ptr + slot * K + k, mask=is_old, other=-1) == last)

    # The newer whole block of this epoch and length. Atomic reads with acquire order at system scope: the writer may
    # be another stream, the host or another GPU.
    epoch = tl.load(epochs_ptr + slot)
    length = (tl.load(total_lens_ptr + slot) - num_sampled).to(tl.int64)
    half = slot * 2
    header = headers_ptr + half * 3
    version = tl.atomic_add(header, 0, sem="acquire", scope="sys")
    other_version = tl.atomic_add(header + 3, 0, sem="acquire", scope="sys")
    answers = (tl.load(header + 1, volatile=True) == epoch) & (tl.load(header + 2, volatile=True) == length)
    other_answers = (tl.load(header + 4, volatile=True) == epoch) & (tl.load(header + 5, volatile=True) == length)
    has_block = answers | other_answers
    usable = answers & (version % 2 == 0)
    other_usable = other_answers & (other_version % 2 == 0)
    if other_usable & ((other_version > version) | (usable == 0)):
        version = other_version
        half += 1
    usable = (usable | other_usable) & decided & (is_rest == 0)

    row = tl.arange(0, BLOCK_N)
    at = half * N + row
    outcome = outcomes_ptr + at * 2
    in_block = (row < N) & usable
    depths = tl.load(depths_ptr + at, mask=in_block, other=0, cache_modifier=".cg")
    match = (
        (tl.load(outcome, mask=in_block, other=-1, cache_modifier=".cg") == k)
        & (tl.load(outcome + 1, mask=in_block, other=-1, cache_modifier=".cg") == last)
        & (depths > 0)
    )
    branch = tl.min(tl.where(match, row, N), 0)
    is_hit = branch < N
    depth = tl.sum(tl.where(row == branch, depths, 0), 0)
    num_found = tl.where(is_rest, num_old - k - 1, tl.where(is_hit, depth, 0))

    first = tl.where(is_rest, slot * K + k + 1, (half * N + branch) * K)  # draft, of the old ones or of the block
    from_old = is_rest & (draft < num_found)
    from_block = is_hit & (draft < num_found)
    token_ids = tl.load(draft_token_ids_ptr + first + draft, mask=from_block, other=-1, cache_modifier=".cg")
    old_token_ids = tl.load(verifying_token_ids_ptr + first + draft, mask=from_old, other=-1)
    token_ids = tl.where(from_old, old_token_ids, token_ids)
    has_q = is_sampled == 0
    if M > 0:
        if is_sampled:
            old_prob = tl.load(verifying_q_probs_ptr + first * M, mask=is_rest & (num_found > 0), other=0.0)
            prob = tl.load(q_probs_ptr + first * M, mask=is_hit, other=0.0, cache_modifier=".cg")
            has_q = tl.where(is_rest, old_prob, prob) > 0
            for start in range(0, K * M, BLOCK_KM):
                entry = start + tl.arange(0, BLOCK_KM)
                old_entry = is_rest & (entry < num_found * M)
                block_entry = is_hit & (entry < num_found * M)
                at_entry = first * M + entry
                q_ids = tl.load(q_token_ids_ptr + at_entry, mask=block_entry, other=0, cache_modifier=".cg")
                old_q_ids = tl.load(verifying_q_token_ids_ptr + at_entry, mask=old_entry, other=0)
                q_probs = tl.load(q_probs_ptr + at_entry, mask=block_entry, other=0.0, cache_modifier=".cg")
                old_q_probs = tl.load(verifying_q_probs_ptr + at_entry, mask=old_entry, other=0.0)
                tl.debug_barrier()  # every thread has read what the others overwrite
                to_entry = slot * K * M + entry
                q_ids, q_probs = tl.where(old_entry, old_q_ids, q_ids), tl.where(old_entry, old_q_probs, q_probs)
                tl.store(verifying_q_token_ids_ptr + to_entry, q_ids, mask=entry < num_found * M)
                tl.store(verifying_q_probs_ptr + to_entry, q_probs, mask=entry < num_found * M)

    tl.debug_barrier()  # every thread has read what it reads of the block before one looks at the version again
    unmoved = tl.atomic_add(headers_ptr + half * 3, 0, sem="acq_rel", scope="sys") == version
    num_found = tl.where((is_rest | (is_hit & unmoved)) & has_q, num_found, 0)
    num_drafted = tl.minimum(num_found, wanted)
    num_drafts = num_drafted
    if ngram_ptr is not None:
        if decided & (num_drafted < wanted):
            ngram_ids = tl.load(ngram_ptr + i * K + draft, mask=draft < K, other=-1).to(tl.int32)
            beyond = draft >= num_drafted
            if tl.sum(tl.where(beyond | (token_ids == ngram_ids), 0, 1), 0) == 0:
                num_drafts = wanted.to(tl.int32)
                token_ids = tl.where(beyond, ngram_ids, token_ids)
                if M > 0:
                    if is_sampled:
                        for start in range(0, K * M, BLOCK_KM):
                            entry = start + tl.arange(0, BLOCK_KM)
                            in_q = (entry >= num_drafted * M) & (entry < K * M)
                            q_ids = tl.load(ngram_ptr + i * K + entry // M, mask=in_q, other=0).to(tl.int32)
                            to_entry = slot * K * M + entry
                            tl.store(verifying_q_token_ids_ptr + to_entry, q_ids, mask=in_q)
                            tl.store(verifying_q_probs_ptr + to_entry, tl.where(entry % M == 0, 1.0, 0.0), mask=in_q)

    is_draft = draft < num_drafts
    tl.store(verifying_num_drafts_ptr + slot, num_drafts)
    tl.store(out_drafts_ptr, num_drafts.to(tl.int64))
    tl.store(out_drafts_ptr + 1 + draft, tl.where(is_draft, token_ids, last).to(tl.int64), mask=draft < K)
    token_ids = tl.where(is_draft, token_ids, -1)
    tl.store(verifying_token_ids_ptr + slot * K + draft, token_ids, mask=draft < K)
    tl.store(out_outcomes_ptr, num_sampled)
    tl.store(out_outcomes_ptr + 1, last)
    tl.store(out_outcomes_ptr + 2, tl.where(has_block, tl.where(num_found > 0, 2, 1), 0))
    tl.store(out_outcomes_ptr + 3, tl.where(num_found > 0, tl.where(is_rest, N, branch), -1))
    tl.store(out_outcomes_ptr + 4, num_drafts)
    tl.store(out_outcomes_ptr + 5, num_drafted)
    tl.store(out_outcomes_ptr + 6 + draft, token_ids, mask=draft < K)
