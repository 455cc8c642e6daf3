"""The noise of vLLM's V1 runner on a CPU, as target and drafter both compute it."""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def round_seed(seed: int, length: int) -> int:
    """Seed of a request's generator for the round that starts at committed `length`; in 0 … 2^32 - 1."""
    return int(_mix(np.array([(seed + (length + 1) * int(_GAMMA)) % 2**64], np.uint64))[0] >> np.uint64(32))


def splitmix_gumbel(seed: int, token_ids: np.ndarray) -> np.ndarray:
    """Gumbel noise of each of `token_ids` [n], float32, as in vLLM's `fused_gumbel_argmax` for the CPU.

    seed: at least 0. The noise is SplitMix64 (Steele et al., 2014) of the seed and the token id.
    """
    counters = token_ids.astype(np.uint64) + np.uint64(1)
    bits = _mix(_mix(np.array([seed], np.uint64)) + counters * _GAMMA) >> np.uint64(11)
    return (-np.log(-np.log((bits.astype(np.float64) + 0.5) * 2.0**-53))).astype(np.float32)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
