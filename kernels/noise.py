"""The Gumbel noise with which vLLM's V2 runner draws tokens: a hash of request seed, position and token id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def hashed_gumbel(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The standard Gumbel noise that vLLM's `gumbel_noised_argmax` adds to logits / T in float32, from 0.31 on.

    seeds int64, of requests; positions, of the tokens that the logits follow, and token_ids of any integer type;
    broadcast -> float32. The uniform numbers are vLLM's to the bit, from MurmurHash3. The noise differs by up to 4e-6,
    because vLLM computes one of the logarithms from a series.
    """
    # int32 wraps as uint32 does, at half the memory of int64 and a third of its time. Seeds and positions are mixed
    # before they are broadcast; what follows is in place.
    words = _mix(_mix(torch.zeros_like(seeds, dtype=torch.int32), seeds.int()), (seeds >> 32).int())
    words = _mix(words, positions.int()) ^ _scramble(token_ids.int())
    buffer = words << 13
    words >>= 19
    words &= (1 << 13) - 1
    words |= buffer
    words *= 5
    words += _signed(0xE6546B64)
    words ^= 16  # bytes hashed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words ^= _shift_right(words, shift, out=buffer)
        words *= _signed(factor)
    high = _shift_right(words, 16, out=buffer)
    words ^= high
    words &= 0xFFFF
    uniform = words.float().add_(0.5).mul_(2.0**-32).add_(high, alpha=2.0**-16).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)


def _shift_right(words: torch.Tensor, bits: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Shift in zeros, not the sign."""
    return torch.bitwise_right_shift(words, bits, out=out).bitwise_and_((1 << (32 - bits)) - 1)


def _rotate(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words << bits) | _shift_right(words, 32 - bits)


def _scramble(keys: torch.Tensor) -> torch.Tensor:
    return _rotate(keys * _signed(0xCC9E2D51), 15) * _signed(0x1B873593)


def _mix(words: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return _rotate(words ^ _scramble(keys), 13) * 5 + _signed(0xE6546B64)


@triton.jit
def _mix_words(word, key):
    key *= 0xCC9E2D51
    key = (key << 15) | (key >> 17)
    word ^= key * 0x1B873593
    return ((word << 13) | (word >> 19)) * 5 + 0xE6546B64


@triton.jit
def hashed_uniform(seed, position, token_ids):
    """vLLM's `murmur3_uniform32`: uniform numbers above 0 and up to 1, float32."""
    word = _mix_words(0, seed.to(tl.uint32))
    word = _mix_words(word, (seed >> 32).to(tl.uint32))
    word = _mix_words(word, position.to(tl.uint32))
    word = _mix_words(word, token_ids.to(tl.uint32)) ^ 16  # bytes hashed
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    word ^= word >> 16
    high, low = (word >> 16).to(tl.int32), (word & 0xFFFF).to(tl.int32)
    return high.to(tl.float32) * (2.0**-16) + (low.to(tl.float32) + 0.5) * (2.0**-32)


@triton.jit
def add_hashed_gumbel(logits, seed, position, token_ids):
    """`logits` plus the noise of vLLM's `gumbel_noised_argmax` in float32, rounded as there."""
    uniform = hashed_uniform(seed, position, token_ids)
    # -log(1 - uniform), from its series where 1 - uniform would lose digits
    series = 1.0 / 8.0
    for divisor in tl.static_range(7, 0, -1):
        series = 1.0 / divisor + uniform * series
    direct = -tl.log(tl.maximum(1.0 - uniform, 2.0**-24))
    return logits - tl.log(tl.where(uniform < 0.25, uniform * series, direct))
