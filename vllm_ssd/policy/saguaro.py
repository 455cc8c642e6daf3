"""Saguaro sampling: a proposal that makes the bonus token after a rejection easier to predict."""

import numpy as np


def saguaro(probs: np.ndarray, fan_out: np.ndarray | int, factor: np.ndarray | float) -> np.ndarray:
    """Compute the proposal q', proportional to C * q on the F likeliest tokens and to q on all others.

    probs: q [n, M] float, likeliest first, rows sum to 1; fan_out: F [n] or one for all rows; factor: C in [0, 1], [n]
    or one for all rows. -> q' [n, M] of the same dtype, rows sum to 1. Rows with C = 1 or F = 0 and rows without mass
    outside the F likeliest tokens (one-hot rows, hence greedy ones) keep q bit for bit.

    After a rejection the bonus token is drawn from max(0, p - q'), so the less mass q' gives the F tokens that have
    branches, the more often the bonus token is one of them (Saguaro, Definition 14 and Theorem 15). Lossless for every
    C, as long as drafts are drawn from q' and the verifier is given q'.
    """
    prepared = np.arange(probs.shape[1]) < np.reshape(fan_out, (-1, 1))
    weights = np.where(prepared, np.reshape(factor, (-1, 1)), 1.0)
    changed = (weights != 1).any(axis=1) & (np.where(prepared, 0, probs) > 0).any(axis=1)
    scaled = np.where(changed[:, None], weights * probs, probs)
    total = np.where(changed, scaled.sum(axis=1), 1.0)
    return (scaled / total[:, None]).astype(probs.dtype)
