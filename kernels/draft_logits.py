"""Write the proposals of the drafts under verification in the form that vLLM's rejection sampler reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import power_of_2, require_contiguous, use_triton
from vllm_ssd.kernels.lookup import DeviceSpeculation


def write_draft_logits(
    draft_logits: torch.Tensor,
    columns: torch.Tensor,
    verifying: DeviceSpeculation,
    slots: torch.Tensor,
    temperatures: torch.Tensor,
) -> None:
    """Write temperature times log q of the drafts that `B` requests verify, and -inf where q is 0.

    draft_logits [C, K, V] float32, columns [C, K, M] int32, `verifying` and temperatures [S] are indexed by slot,
    C <= S; slots [B] int64, negative for padding. Skips requests at temperature 0 and slots from C on. Only the columns
    written by the previous call, which are stored in `columns`, are reset to -inf. In place, one launch.
    """
    if not use_triton(draft_logits):
        _write_draft_logits_reference(draft_logits, columns, verifying, slots, temperatures)
        return
    require_contiguous(draft_logits, columns, slots, temperatures)
    num_drafts, top_m = columns.shape[1:]
    if len(slots) and top_m:
        _write_draft_logits_kernel[(len(slots), num_drafts)](
            draft_logits,
            columns,
            verifying.q_token_ids,
            verifying.q_probs,
            verifying.num_drafts,
            slots,
            temperatures,
            len(draft_logits),
            draft_logits.shape[2],
            K=num_drafts,
            M=top_m,
            BLOCK_M=min(256, power_of_2(top_m)),
            num_warps=1,
        )


def _write_draft_logits_reference(
    draft_logits: torch.Tensor,
    columns: torch.Tensor,
    verifying: DeviceSpeculation,
    slots: torch.Tensor,
    temperatures: torch.Tensor,
) -> None:
    slots = slots[(slots >= 0) & (slots < len(draft_logits))]
    slots = slots[temperatures[slots] > 0]
    logits, q_token_ids, q_probs = draft_logits[slots], verifying.q_token_ids[slots], verifying.q_probs[slots]
    logits.scatter_(2, columns[slots].long(), -torch.inf)
    is_draft = torch.arange(logits.shape[1], device=slots.device) < verifying.num_drafts[slots, None]
    values = torch.where(is_draft[:, :, None], temperatures[slots, None, None] * q_probs.log(), -torch.inf)
    logits.scatter_reduce_(2, q_token_ids.long(), values, "amax")  # entries without probability may repeat a token
    draft_logits[slots], columns[slots] = logits, q_token_ids


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "temperatures_ptr"])
def _write_draft_logits_kernel(
    draft_logits_ptr,
    columns_ptr,
    q_token_ids_ptr,
    q_probs_ptr,
    num_drafts_ptr,
    slots_ptr,
    temperatures_ptr,
    num_slots,
    vocab_size,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program a draft."""
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    if (slot < 0) | (slot >= num_slots):
        return
    temperature = tl.load(temperatures_ptr + slot)
    if temperature <= 0:
        return
    draft = tl.program_id(1)
    row = slot * K + draft
    logits_ptr = draft_logits_ptr + row * vocab_size
    for start in range(0, M, BLOCK_M):
        entry = start + tl.arange(0, BLOCK_M)
        column = tl.load(columns_ptr + row * M + entry, mask=entry < M, other=0)
        tl.store(logits_ptr + column, -float("inf"), mask=entry < M)
    tl.debug_barrier()  # the old columns are restored before one of them is written again
    is_draft = draft < tl.load(num_drafts_ptr + slot)
    for start in range(0, M, BLOCK_M):
        entry = start + tl.arange(0, BLOCK_M)
        column = tl.load(q_token_ids_ptr + row * M + entry, mask=entry < M, other=0)
        prob = tl.load(q_probs_ptr + row * M + entry, mask=entry < M, other=0.0)
        is_known = is_draft & (prob > 0)
        tl.store(columns_ptr + row * M + entry, column, mask=entry < M)
        tl.store(logits_ptr + column, temperature * tl.log(tl.where(is_known, prob, 1.0)), mask=is_known)
