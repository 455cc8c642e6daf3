"""Foresee the noise with which the target draws bonus tokens.

Theory of operation
-------------------
A target draws a token from p as argmax(log p + g), with Gumbel noise g that depends on a seed and never on p (the
"Gumbel-max trick"). A drafter that knows g expects argmax(log q + g) instead of argmax(log q). Wherever q resembles p,
this hits far more often (Daliri et al. 2024, "Coupling without communication").

The noise only orders candidates, that is, decides which outcomes get branches. Drafts are drawn with random numbers of
the drafter's own: rejection sampling is exact only if a draft does not depend on the noise that it is verified with.

The uniform number that decides about a draft is foreseen, too. It tells which accept lengths are likely.

- `HASHED_NOISE`: vLLM's V2 runner hashes the seed, the position and the token id (`kernels.hashed_gumbel`).
- `SEEDED_NOISE`: on the V1 runner on a CPU, the plugin seeds the request's generator before each round
  (`link.noise`), and `Replay` repeats what vLLM draws from it. That depends on the number of drafts that the round
  verifies, which is known once the round begins. So the likeliest tokens are kept `Unranked` until then.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from vllm_ssd.kernels import hashed_gumbel
from vllm_ssd.link.noise import Replay
from vllm_ssd.link.protocol import HASHED_NOISE, SEEDED_NOISE, Noise

NUM_UNRANKED = 256
"""Likeliest tokens that may become candidates where noise is seeded."""


def hashed_noise(kinds: np.ndarray, seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> torch.Tensor | None:
    """The noise of the bonus token after each of n logits rows, [n, vocab_size] float32; None if no row's is hashed.

    kinds, seeds [n] int64: the request's `protocol.Noise`; positions [n] int64: of the token that the logits follow.
    Noise of other kinds is 0.
    """
    hashed = np.flatnonzero(kinds == HASHED_NOISE)
    if not len(hashed):
        return None
    noise = torch.zeros(len(kinds), vocab_size)
    at = torch.from_numpy(seeds[hashed])[:, None], torch.from_numpy(positions[hashed])[:, None]
    noise[torch.from_numpy(hashed)] = hashed_gumbel(*at, torch.arange(vocab_size))
    return noise


class Unranked(NamedTuple):
    """The likeliest tokens after a logits row, likeliest first: ids int32, and scores float32, which are logits / T."""

    token_ids: np.ndarray
    scores: np.ndarray

    def rank(self, noise: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        """The `num` tokens with the largest score + `noise` [N], best first, and the softmax of these sums."""
        scores = self.scores + noise
        best = np.argsort(-scores)[:num]
        weights = np.exp(scores[best] - scores[best[0]])
        return self.token_ids[best], weights / weights.sum()


def acceptance_uniforms(noise: Noise, length: int, num_drafts: int) -> list[float]:
    """The uniform numbers u of a round's drafts, each of which is accepted if p / q is at least u; empty if unknown."""
    if noise.kind == SEEDED_NOISE:
        return Replay(noise.seed, length, num_drafts).uniforms.tolist()
    if noise.kind == HASHED_NOISE:
        return [philox_uniform(noise.seed, length - 1 + k) for k in range(num_drafts)]
    return []


def philox_uniform(seed: int, counter: int) -> float:
    """`tl.rand(seed, counter)` of Triton, from Philox 4x32-10 (Salmon et al., 2011)."""
    mask = 0xFFFFFFFF
    k0, k1 = seed & mask, seed >> 32 & mask
    c0, c1, c2, c3 = counter & mask, counter >> 32 & mask, 0, 0
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & mask, a >> 32 ^ c3 ^ k1, a & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return min(c0, mask - c0) * 4.6566127342e-10
