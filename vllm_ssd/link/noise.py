"""The noise of vLLM's V1 runner on a CPU, as target and drafter both compute it."""

from __future__ import annotations

import numpy as np
import torch

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def round_seed(seed: int, length: int) -> int:
    """Seed of a request's generator for the round that starts at committed `length`; in 0 … 2^32 - 1."""
    return int(_mix(np.array([(seed + (length + 1) * int(_GAMMA)) % 2**64], np.uint64))[0] >> np.uint64(32))


class Replay:
    """The draws of a round on vLLM's V1 runner.

    vLLM draws from a request's generator, in this order: a seed for the token after the last draft, a uniform number
    for each draft, and exponential noise for the token after a rejected draft (`RejectionSampler.forward`).

    uniforms [num_drafts] float64
    vocab_size: 0 if only these are asked for
    """

    def __init__(self, seed: int, length: int, num_drafts: int, vocab_size: int = 0) -> None:
        generator = torch.Generator().manual_seed(round_seed(seed, length))
        self._last_seed = int(torch.randint(0, 2**31, (1,), generator=generator))
        self.uniforms = torch.empty(num_drafts, dtype=torch.float64).uniform_(generator=generator)
        self._exponential = torch.empty(vocab_size if num_drafts else 0).exponential_(generator=generator).numpy()

    def after_rejection(self, token_ids: np.ndarray) -> np.ndarray:
        """The noise of `token_ids` [n] for the token after a rejected draft, float32."""
        return -np.log(self._exponential[token_ids])

    def after_last(self, token_ids: np.ndarray) -> np.ndarray:
        """The noise of `token_ids` [n] for the token after the last draft, float32."""
        return splitmix_gumbel(self._last_seed, token_ids)


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
