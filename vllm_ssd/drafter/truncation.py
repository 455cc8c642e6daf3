"""Truncate proposals by min_p, top_k and top_p, as vLLM truncates the target's distribution."""

from __future__ import annotations

import numpy as np

from vllm_ssd.link.protocol import Truncation

NO_TOP_K = 1 << 24
"""top_k of rows without one: more tokens than any proposal has, and exact in float32."""
WIDEST_TOP_P = 0.9
"""Without top_k, a larger top_p is ignored: it would apply to the proposal's tokens alone, whose mass is below 1, and
cost more acceptance than it gains (measured, see docs/benchmarks.md)."""
NOTHING = (NO_TOP_K, 1.0, 0.0)
"""Row of a request without truncation."""


def leaves_tokens(truncation: Truncation) -> bool:
    """Whether the values are in vLLM's valid ranges, so that at least the likeliest token is left."""
    return truncation.top_k >= 0 and 0 < truncation.top_p <= 1 and 0 <= truncation.min_p <= 1


def truncation_row(truncation: Truncation) -> tuple[float, float, float]:
    """top_k, top_p and min_p as `truncate` takes them."""
    top_k, top_p = truncation.top_k, truncation.top_p
    if not top_k and top_p > WIDEST_TOP_P:
        top_p = 1.0
    return min(top_k or NO_TOP_K, NO_TOP_K), top_p, truncation.min_p


def truncate(probs: np.ndarray, truncations: np.ndarray) -> np.ndarray:
    """Truncate and renormalise `probs` [n, M] float32, likeliest first.

    truncations [n, 3] float32: top_k, top_p, min_p. As in vLLM, this removes tokens below min_p times the likeliest,
    then all but the top_k likeliest, then those after the first that together reach top_p of the remaining mass. The
    likeliest token always stays. Rows that lose no token are kept bit for bit.
    """
    if (truncations == np.array(NOTHING, np.float32)).all():
        return probs
    top_k, top_p, min_p = truncations.T[:, :, None]
    kept = np.arange(probs.shape[1]) < top_k
    kept &= probs >= min_p * probs[:, :1]
    left = np.where(kept, probs, 0)
    up_to = np.cumsum(left, axis=1)
    kept &= (up_to - left < top_p * up_to[:, -1:]) | (top_p >= 1)
    kept[:, 0] = True
    left = np.where(kept, probs, 0)
    changed = (left != probs).any(axis=1, keepdims=True)
    total = np.where(changed, left.sum(axis=1, keepdims=True), 1)
    return (left / total).astype(probs.dtype)
