"""Logit biases of requests (`allowed_token_ids` and `logit_bias`), as rows of one table on the device."""

from __future__ import annotations

import functools

import numpy as np
import torch

from vllm_ssd.link.protocol import NO_BIAS, Bias

NUM_BIASES = 16
"""Most distinct biases at a time. Further requests are drafted without their bias, which only costs acceptance."""
UNBIASED = 0
"""Row of requests without a bias."""
FORBIDDEN = -1e4
"""Bias of tokens that are not allowed; makes their probability 0 in float32. Finite, so that drawing still works for a
request that allows only tokens which the draft model lacks."""


class Biases:
    """A table of biases, in which requests with equal biases share a row."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._rows: list[Bias] = [NO_BIAS] * (1 + NUM_BIASES)
        self._holders = np.zeros(1 + NUM_BIASES, np.int64)
        self._forbidden = np.zeros((1 + NUM_BIASES, vocab_size), bool)

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """[1 + NUM_BIASES, V] float32, on the device; row `UNBIASED` is zero. Allocated on first use."""
        return torch.zeros(1 + NUM_BIASES, self._vocab_size, device=self._device)

    def hold(self, bias: Bias) -> int:
        """Acquire the row of `bias`; `UNBIASED` if it does not fit the vocabulary or no row is left.

        No launched step may still be reading the table.
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
        """Release `row` once; an unused row keeps its bias until another one needs the space."""
        if row != UNBIASED:
            self._holders[row] -= 1

    def allowed(self, row: int, token_ids: np.ndarray) -> np.ndarray:
        """The subset of `token_ids` [n] that a request with `row` may sample."""
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
    """`bias` as a [vocab_size] float32 array to add to logits; None if it is invalid for this vocabulary."""
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
