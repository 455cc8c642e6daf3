"""What requests add to their logits before anything is drawn from them: `allowed_token_ids` and `logit_bias`."""

from __future__ import annotations

import functools

import numpy as np
import torch

from vllm_ssd.link.protocol import NO_BIAS, Bias

NUM_BIASES = 16
"""Different ones at a time. Requests beyond them are drafted for without, which costs acceptance alone."""
UNBIASED = 0
"""The row of requests that add nothing."""
FORBIDDEN = -1e4
"""Added where a token is not allowed: its probability is 0 in float32. Finite, so that a request which allows only
tokens that the draft model lacks still has something to draw from."""


class Biases:
    """A table of biases, one row however many requests have it."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._rows: list[Bias] = [NO_BIAS] * (1 + NUM_BIASES)
        self._holders = np.zeros(1 + NUM_BIASES, np.int64)
        self._forbidden = np.zeros((1 + NUM_BIASES, vocab_size), bool)

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """[1 + NUM_BIASES, V] float32, on the device; row `UNBIASED` is zero. Made when it is first asked for."""
        return torch.zeros(1 + NUM_BIASES, self._vocab_size, device=self._device)

    def hold(self, bias: Bias) -> int:
        """The row of `bias`, until it is released; `UNBIASED` where it does not fit the vocabulary, or no row is left.

        Nothing that was launched may read the table any more.
        """
        if bias == NO_BIAS:
            return UNBIASED
        if bias in self._rows:
            row = self._rows.index(bias)
        else:
            row = int(self._holders[1:].argmin()) + 1
            dense = dense_bias(bias, self._vocab_size)
            if self._holders[row] or dense is None:
                return UNBIASED
            self.table[row].copy_(torch.from_numpy(dense))
            self._forbidden[row] = dense == FORBIDDEN
            self._rows[row] = bias
        self._holders[row] += 1
        return row

    def release(self, row: int) -> None:
        """One request fewer has `row`; it is kept for the next until the room is needed."""
        if row != UNBIASED:
            self._holders[row] -= 1

    def allowed(self, row: int, token_ids: np.ndarray) -> np.ndarray:
        """Those of `token_ids` [n] that a request with `row` may sample."""
        return token_ids if row == UNBIASED else token_ids[~self._forbidden[row, token_ids]]

    @torch.inference_mode()
    def add(self, logits: torch.Tensor, rows: np.ndarray) -> None:
        """Add row `rows[i]` to `logits[i]`, [n, V] or narrower, in place."""
        biased = np.flatnonzero(rows)
        if len(biased):
            at = torch.from_numpy(biased).to(logits.device)
            values = self.table[torch.from_numpy(rows[biased]).to(logits.device).long(), : logits.shape[1]]
            logits.index_add_(0, at, values.to(logits.dtype))


def dense_bias(bias: Bias, vocab_size: int) -> np.ndarray | None:
    """What `bias` adds to each logit, [vocab_size] float32; None if it is no bias over such a vocabulary."""
    if len(bias.token_ids) % 4 or len(bias.token_ids) != len(bias.values):
        return None
    token_ids, values = np.frombuffer(bias.token_ids, "<i4"), np.frombuffer(bias.values, "<f4")
    if not ((token_ids >= 0) & (token_ids < vocab_size) & (np.abs(values) < -FORBIDDEN)).all():
        return None
    dense = np.zeros(vocab_size, np.float32)
    dense[token_ids] = values
    if bias.allowed:
        bits = np.unpackbits(np.frombuffer(bias.allowed, np.uint8))[:vocab_size].astype(bool)
        if not bits.any():
            return None
        dense[len(bits) :] = FORBIDDEN
        dense[: len(bits)][~bits] = FORBIDDEN
    return dense
