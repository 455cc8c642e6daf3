"""Draw tokens from logits, together with the distribution that they were drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import require_contiguous, use_triton
from vllm_ssd.kernels.noise import add_hashed_gumbel, hashed_gumbel

_GROUP = 64
"""Logits per group. The M likeliest tokens are in the M groups with the largest maxima, so only these are searched."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The tokens drawn after each of `B` rows of logits.

    token_ids [B] int32: the drawn tokens; q_token_ids [B, M] int32: the M likeliest tokens, likeliest first, ties by
    lower id; q_probs [B, M] float32: the proposal that `token_ids` was drawn from; draft_probs [B] float32: the drawn
    token's share of the C likeliest tokens' softmax, and the least of these shares if it is none of them.

    candidate_ids [B, C] int32: the C tokens that the target is likeliest to draw, best first, ties by lower id;
    candidate_probs [B, C] float32: the softmax of what ranks them. That is logits / T, with T = 1 for greedy rows, plus
    the target's noise where it is foreseen.
    """

    token_ids: torch.Tensor
    q_token_ids: torch.Tensor
    q_probs: torch.Tensor
    draft_probs: torch.Tensor
    candidate_ids: torch.Tensor
    candidate_probs: torch.Tensor


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    fan_out: torch.Tensor,
    *,
    top_m: int,
    num_candidates: int = 1,
    factor: float = 1.0,
    truncations: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
    bias_rows: torch.Tensor | None = None,
    target_seeds: torch.Tensor | None = None,
    foreseen: torch.Tensor | None = None,
) -> Sample:
    """Draw each row's token from the softmax over its `top_m` likeliest tokens, truncated and down-weighted.

    logits [B, V]: any float dtype, V >= top_m, unit stride in the last axis
    temperatures [B] float32: 0 for greedy rows, which take the likeliest token with probability 1
    biases [S, W] float32, W >= V, bias_rows [B] int32: row `bias_rows[i]` of `biases` is first added to row i of
    `logits`, in place; row 0 means none
    truncations [B, 3] float32: columns top_k, top_p, min_p; None for none. Removes tokens below min_p times the
    likeliest, then all but the top_k likeliest, then those after the first that together reach top_p of the rest
    fan_out [B] int32: number of likeliest tokens that will be predicted as bonus tokens, whose weights are multiplied
    by `factor` in [0, 1], unless no other token has any weight (Saguaro sampling; 1 disables it)
    num_candidates: C, at most top_m
    seeds [B] int64, positions [B] int64: determine the draw, by Gumbel noise from Philox with the seed as key, position
    and rank as counter. Rows with the same seed and position get the same noise, so give every request its own seed.
    target_seeds [B] int64, foreseen [B] int32, both or none: where `foreseen` is not 0 and the row is not greedy, the
    target will add `hashed_gumbel` of `target_seeds` and `positions`, and candidates are ranked with it, out of the
    whole vocabulary. The draw never depends on it: a proposal must be independent of the noise it is verified with.
    """
    if not use_triton(logits):
        if biases is not None and bias_rows is not None:
            logits += torch.where(bias_rows[:, None] > 0, biases[bias_rows.long(), : logits.shape[1]], 0)
        drawing = temperatures, seeds, positions, fan_out
        drawn = _sample_reference(logits, *drawing, top_m, num_candidates, factor, truncations)
        if target_seeds is not None and foreseen is not None:
            _foresee_reference(logits, temperatures, positions, target_seeds, foreseen, drawn)
        return drawn
    require_contiguous(temperatures, seeds, positions, fan_out)
    optional = truncations, biases, bias_rows, target_seeds, foreseen
    require_contiguous(*(tensor for tensor in optional if tensor is not None))
    num_rows, vocab_size = logits.shape
    drawn = Sample(
        torch.empty(num_rows, dtype=torch.int32, device=logits.device),
        torch.empty(num_rows, top_m, dtype=torch.int32, device=logits.device),
        torch.empty(num_rows, top_m, dtype=torch.float32, device=logits.device),
        torch.empty(num_rows, dtype=torch.float32, device=logits.device),
        torch.empty(num_rows, num_candidates, dtype=torch.int32, device=logits.device),
        torch.empty(num_rows, num_candidates, dtype=torch.float32, device=logits.device),
    )
    if not num_rows:
        return drawn
    num_groups = triton.cdiv(vocab_size, _GROUP)
    maxima = torch.empty(num_rows, num_groups, dtype=logits.dtype, device=logits.device)
    is_foreseen = target_seeds is not None and foreseen is not None
    of_target = (temperatures, positions, target_seeds, foreseen) if is_foreseen else (temperatures,) * 4
    noised_maxima = torch.empty_like(maxima, dtype=torch.float32) if is_foreseen else maxima
    groups_per_program = 32
    _maxima_kernel[(num_rows, triton.cdiv(num_groups, groups_per_program))](
        logits,
        maxima,
        logits if biases is None else biases,
        seeds if bias_rows is None else bias_rows,
        noised_maxima,
        *of_target,
        vocab_size,
        num_groups,
        logits.stride(0),
        0 if biases is None else biases.stride(0),
        BIASED=biases is not None and bias_rows is not None,
        FORESEEN=is_foreseen,
        GROUP=_GROUP,
        GROUPS=groups_per_program,
    )
    block_m = max(2, triton.next_power_of_2(top_m))
    _draw_kernel[(num_rows,)](
        logits,
        maxima,
        temperatures,
        seeds,
        positions,
        fan_out,
        temperatures if truncations is None else truncations,
        drawn.token_ids,
        drawn.q_token_ids,
        drawn.q_probs,
        drawn.draft_probs,
        drawn.candidate_ids,
        drawn.candidate_probs,
        factor,
        vocab_size,
        num_groups,
        logits.stride(0),
        M=top_m,
        C=num_candidates,
        TRUNCATED=truncations is not None,
        GROUP=_GROUP,
        BLOCK_M=block_m,
        BLOCK=max(block_m, 1024),
        GROUPS=min(block_m, max(1, 1024 // _GROUP)),
        num_warps=8,
    )
    if is_foreseen:
        block_c = max(2, triton.next_power_of_2(num_candidates))
        _foresee_kernel[(num_rows,)](
            logits,
            noised_maxima,
            *of_target,
            drawn.candidate_ids,
            drawn.candidate_probs,
            vocab_size,
            num_groups,
            logits.stride(0),
            C=num_candidates,
            GROUP=_GROUP,
            BLOCK_C=block_c,
            BLOCK=max(block_c, 1024),
            GROUPS=min(block_c, max(1, 1024 // _GROUP)),
            num_warps=8,
        )
    return drawn


def _sample_reference(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    fan_out: torch.Tensor,
    top_m: int,
    num_candidates: int,
    factor: float,
    truncations: torch.Tensor | None,
) -> Sample:
    values, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :top_m], ids[:, :top_m]
    rank = torch.arange(top_m)
    greedy = temperatures[:, None] == 0
    weights = torch.exp((values - values[:, :1]) / torch.where(greedy, 1, temperatures[:, None]))
    candidate_probs = weights[:, :num_candidates] / weights[:, :num_candidates].sum(-1, keepdim=True)
    weights = torch.where(greedy, (rank == 0).float(), weights)
    if truncations is not None:
        top_k, top_p, min_p = truncations.T[:, :, None]
        weights = torch.where((rank == 0) | (rank < top_k) & (weights >= min_p), weights, 0)
        up_to = weights.cumsum(-1)
        kept = (top_p >= 1) | (rank == 0) | (up_to - weights < top_p * up_to[:, -1:])
        weights = torch.where(kept, weights, 0)
    predicted = rank < fan_out[:, None]
    scaled = predicted & torch.where(predicted, 0, weights).any(-1, keepdim=True)
    weights = torch.where(scaled, weights * factor, weights)
    noise = _gumbel(seeds[:, None], positions[:, None] * top_m + rank)
    choice = torch.where(greedy, 0, torch.log(weights) + noise).masked_fill(weights == 0, float("-inf")).argmax(-1)
    token_ids = ids.gather(1, choice[:, None])[:, 0]
    q_probs = weights / weights.sum(-1, keepdim=True)
    draft_probs = candidate_probs.gather(1, choice[:, None].clamp(max=num_candidates - 1))[:, 0]
    return Sample(token_ids.int(), ids.int(), q_probs, draft_probs, ids[:, :num_candidates].int(), candidate_probs)


def _foresee_reference(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    positions: torch.Tensor,
    target_seeds: torch.Tensor,
    foreseen: torch.Tensor,
    drawn: Sample,
) -> None:
    rows = ((foreseen != 0) & (temperatures != 0)).nonzero()[:, 0]
    noise = hashed_gumbel(target_seeds[rows, None], positions[rows, None], torch.arange(logits.shape[1]))
    scores, ids = (logits[rows].float() / temperatures[rows, None] + noise).sort(dim=-1, descending=True, stable=True)
    num_candidates = drawn.candidate_ids.shape[1]
    drawn.candidate_ids[rows] = ids[:, :num_candidates].int()
    drawn.candidate_probs[rows] = torch.softmax(scores[:, :num_candidates], dim=-1)


def _gumbel(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, from the first word of Philox 4x32-10 (Salmon et al., 2011)."""
    mask = 0xFFFFFFFF

    def multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """High and low word of a product of two 32-bit words, in int64 arithmetic."""
        low = a * (b & 0xFFFF)
        high = a * (b >> 16) + (low >> 16)
        return high >> 16, (high << 16 & mask) | (low & 0xFFFF)

    seeds, counters = torch.broadcast_tensors(seeds, counters)
    k0, k1 = seeds & mask, seeds >> 32 & mask
    c0, c1 = counters & mask, counters >> 32 & mask
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        high_0, low_0 = multiply(0xD2511F53, c0)
        high_2, low_2 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    uniform = ((c0 >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform))


@triton.jit
def _sort_keys(values, ids):
    """int64 keys in the order of (value, lower id first)."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats fall as their bits grow
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _ids(keys):
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _values(keys):
    ordered = (keys >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _keep_largest(kept, keys, M: tl.constexpr):
    """The M largest of M kept keys and any number of new ones, in descending order."""
    return tl.topk(tl.reshape(tl.join(kept, tl.topk(keys, M)), [2 * M]), M)


@triton.jit
def _maxima_kernel(
    logits_ptr,
    maxima_ptr,
    biases_ptr,
    bias_rows_ptr,
    noised_maxima_ptr,
    temperatures_ptr,
    positions_ptr,
    target_seeds_ptr,
    foreseen_ptr,
    vocab_size,
    num_groups,
    logits_stride,
    biases_stride,
    BIASED: tl.constexpr,
    FORESEEN: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program a row and `GROUPS` groups of `GROUP` logits: the largest logit of each group, bias included.

    In rows whose noise is foreseen, also the largest logit / T plus noise.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits_ptr += row * logits_stride
    logits = tl.load(logits_ptr + token, mask=token < vocab_size, other=float("-inf"))
    if BIASED:
        bias_row = tl.load(bias_rows_ptr + row).to(tl.int64)
        if bias_row > 0:
            bias = tl.load(biases_ptr + bias_row * biases_stride + token, mask=token < vocab_size, other=0.0)
            logits = (logits.to(tl.float32) + bias).to(logits.dtype)
            tl.store(logits_ptr + token, logits, mask=token < vocab_size)
    tl.store(maxima_ptr + row * num_groups + group, tl.max(logits.to(tl.float32), 1), mask=group < num_groups)
    if FORESEEN:
        temperature = tl.load(temperatures_ptr + row)
        if (tl.load(foreseen_ptr + row) != 0) & (temperature != 0):
            seed, position = tl.load(target_seeds_ptr + row), tl.load(positions_ptr + row)
            scores = add_hashed_gumbel(logits.to(tl.float32) / temperature, seed, position, token)
            tl.store(noised_maxima_ptr + row * num_groups + group, tl.max(scores, 1), mask=group < num_groups)


@triton.jit
def _best_groups(maxima_ptr, num_groups, M: tl.constexpr, BLOCK: tl.constexpr):
    """The M groups with the largest maxima, in descending order; `num_groups` in places beyond the last group."""
    lowest = tl.full([M], -(2**63), tl.int64)
    best = lowest
    for start in range(0, num_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        maximum = tl.load(maxima_ptr + group, mask=group < num_groups, other=float("-inf"))
        keys = tl.where(group < num_groups, _sort_keys(maximum, group), -(2**63))
        best = _keep_largest(best, keys, M)
    return tl.where(best == lowest, num_groups, _ids(best))


@triton.jit
def _tokens_of(groups, start, M: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """The tokens of `GROUPS` of the M groups, from `groups[start]` on."""
    # Gathered out of the register block that holds all groups.
    wanted = start + tl.arange(0, GROUPS)
    chosen = tl.sum(tl.where(wanted[:, None] == tl.arange(0, M)[None, :], groups[None, :], 0), 1)
    return tl.reshape(chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [GROUPS * GROUP])


@triton.jit
def _draw_kernel(
    logits_ptr,
    maxima_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    fan_out_ptr,
    truncations_ptr,
    token_ids_ptr,
    q_token_ids_ptr,
    q_probs_ptr,
    draft_probs_ptr,
    candidate_ids_ptr,
    candidate_probs_ptr,
    factor,
    vocab_size,
    num_groups,
    logits_stride,
    M: tl.constexpr,
    C: tl.constexpr,
    TRUNCATED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program a row: the groups worth looking into, the M likeliest tokens in them, one draw."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK_M)
    groups = _best_groups(maxima_ptr + row * num_groups, num_groups, BLOCK_M, BLOCK)
    best = tl.full([BLOCK_M], -(2**63), tl.int64)
    for start in range(0, BLOCK_M, GROUPS):
        token = _tokens_of(groups, start, BLOCK_M, GROUP, GROUPS)
        logits = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf"))
        keys = tl.where(token < vocab_size, _sort_keys(logits, token), -(2**63))
        best = _keep_largest(best, keys, BLOCK_M)
    ids = _ids(best)
    values = tl.where(rank < M, _values(best), float("-inf"))

    temperature = tl.load(temperatures_ptr + row)
    greedy = temperature == 0
    weights = tl.exp((values - tl.max(values, 0)) / tl.where(greedy, 1.0, temperature))
    candidates = tl.where(rank < C, weights, 0.0)
    candidates /= tl.sum(candidates, 0)
    tl.store(candidate_ids_ptr + row * C + rank, ids, mask=rank < C)
    tl.store(candidate_probs_ptr + row * C + rank, candidates, mask=rank < C)
    weights = tl.where(greedy, (rank == 0).to(tl.float32), weights)
    if TRUNCATED:
        top_k = tl.load(truncations_ptr + row * 3)
        top_p = tl.load(truncations_ptr + row * 3 + 1)
        min_p = tl.load(truncations_ptr + row * 3 + 2)
        weights = tl.where((rank == 0) | (rank < top_k) & (weights >= min_p), weights, 0.0)
        above = tl.cumsum(weights, 0) - weights
        enough = tl.where(top_p >= 1.0, float("inf"), top_p * tl.sum(weights, 0))
        weights = tl.where((rank == 0) | (above < enough), weights, 0.0)
    predicted = rank < tl.load(fan_out_ptr + row)
    beside = tl.sum(tl.where(predicted, 0.0, weights), 0)
    weights = tl.where(predicted, weights * tl.where(beside > 0, factor, 1.0), weights)
    counter = tl.load(positions_ptr + row) * M + rank
    word = tl.randint(tl.load(seeds_ptr + row), counter).to(tl.uint32, bitcast=True)
    uniform = ((word >> 8).to(tl.float32) + 0.5) * (2.0**-24)
    noise = tl.where(greedy, 0.0, -tl.log(-tl.log(uniform)))
    score = tl.where(weights > 0, tl.log(weights) + noise, float("-inf"))
    choice = tl.argmax(score, 0)
    tl.store(token_ids_ptr + row, tl.sum(tl.where(rank == choice, ids, 0), 0))
    draft_prob = tl.sum(tl.where(rank == tl.minimum(choice, C - 1), candidates, 0.0), 0)
    tl.store(draft_probs_ptr + row, draft_prob)
    tl.store(q_token_ids_ptr + row * M + rank, ids, mask=rank < M)
    tl.store(q_probs_ptr + row * M + rank, weights / tl.sum(weights, 0), mask=rank < M)


@triton.jit
def _foresee_kernel(
    logits_ptr,
    noised_maxima_ptr,
    temperatures_ptr,
    positions_ptr,
    target_seeds_ptr,
    foreseen_ptr,
    candidate_ids_ptr,
    candidate_probs_ptr,
    vocab_size,
    num_groups,
    logits_stride,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program a row: where its noise is foreseen, the tokens that are best with it become the candidates."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    if (tl.load(foreseen_ptr + row) == 0) | (temperature == 0):
        return
    seed, position = tl.load(target_seeds_ptr + row), tl.load(positions_ptr + row)
    groups = _best_groups(noised_maxima_ptr + row * num_groups, num_groups, BLOCK_C, BLOCK)
    best = tl.full([BLOCK_C], -(2**63), tl.int64)
    for start in range(0, BLOCK_C, GROUPS):
        token = _tokens_of(groups, start, BLOCK_C, GROUP, GROUPS)
        logits = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf"))
        scores = add_hashed_gumbel(logits.to(tl.float32) / temperature, seed, position, token)
        keys = tl.where(token < vocab_size, _sort_keys(scores, token), -(2**63))
        best = _keep_largest(best, keys, BLOCK_C)
    rank = tl.arange(0, BLOCK_C)
    scores = tl.where(rank < C, _values(best), float("-inf"))
    tl.store(candidate_ids_ptr + row * C + rank, _ids(best), mask=rank < C)
    tl.store(candidate_probs_ptr + row * C + rank, tl.softmax(scores), mask=rank < C)
