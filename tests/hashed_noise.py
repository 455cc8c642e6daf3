"""The noise of vLLM's V2 runner, computed a second time."""

from __future__ import annotations

import numpy as np


def gumbel_noise(seed: int, position: int, token_ids: np.ndarray) -> np.ndarray:
    """The noise [N] of tokens [N] that follow the token at `position` in a request with the `seed`."""
    uniform = (hashed(seed, position, token_ids) + 0.5) / 2**32
    return -np.log(-np.log1p(-uniform))


def hashed(seed: int, position: int, token_ids: np.ndarray) -> np.ndarray:
    """Murmur3 with a seed of 0 of four words each: two of the request's seed, the position, and the token's id."""
    state = np.zeros(len(token_ids), np.uint32)
    words = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, position & 0xFFFFFFFF
    for word in (*(np.full_like(state, word) for word in words), token_ids.astype(np.uint32)):
        state ^= rotated(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        state = rotated(state, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    state ^= np.uint32(4 * (len(words) + 1))
    state = (state ^ state >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    state = (state ^ state >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return state ^ state >> np.uint32(16)


def rotated(words: np.ndarray, bits: int) -> np.ndarray:
    """`words` of 32 bits, rotated to the left."""
    return words << np.uint32(bits) | words >> np.uint32(32 - bits)
