"""Speculation blocks in the target's memory: what `lookup` reads while the next ones are being written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """Two blocks for each of `S` requests: the newest whole one, and the one that is being written or was overtaken.

    headers [S, 2, 3] int64: version, epoch, length. The version is a sequence lock: odd while the block is being
    written, and larger after every write. Epoch and length say which round the block answers.
    outcomes [S, 2, N, 2] int32: accept length and bonus token of each branch; depths [S, 2, N] int32: how many drafts
    it has so far, 0 for none. draft_token_ids [S, 2, N, K] int32; q_token_ids [S, 2, N, K, M] int32 and
    q_probs [S, 2, N, K, M] float32: the proposal of each draft, unused (M may be 0) where decoding is greedy.
    """

    headers: torch.Tensor
    outcomes: torch.Tensor
    depths: torch.Tensor
    draft_token_ids: torch.Tensor
    q_token_ids: torch.Tensor
    q_probs: torch.Tensor
    _versions: np.ndarray = field(repr=False)  # [S] int64, of the newest block of each request

    @classmethod
    def empty(
        cls,
        num_requests: int,
        max_branches: int,
        num_speculative_tokens: int,
        top_m: int,
        device: torch.device | str,
    ) -> DeviceBlocks:
        """Blocks that match no outcome."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(num_requests, 2, *shape, dtype=dtype, device=device)

        n, k = max_branches, num_speculative_tokens
        return cls(
            zeros(3, dtype=torch.int64) - torch.tensor([0, 1, 1], device=device),
            zeros(n, 2) - 1,
            zeros(n),
            zeros(n, k),
            zeros(n, k, top_m),
            zeros(n, k, top_m, dtype=torch.float32),
            np.zeros(num_requests, np.int64),
        )

    def write(
        self,
        slots: np.ndarray,
        rounds: np.ndarray,
        outcomes: np.ndarray,
        depths: np.ndarray,
        draft_token_ids: np.ndarray,
        is_sampled: np.ndarray,
        q_token_ids: np.ndarray,
        q_probs: np.ndarray,
    ) -> None:
        """Replace the older of the two blocks of each of `slots`; readers see a block whole or not at all.

        slots [n] int64, distinct; rounds [n, 2] int64, epoch and length; outcomes [n, N, 2], depths [n, N] and
        draft_token_ids [n, N, K] int32; is_sampled [n] bool says which requests have a proposal, whose rows alone
        are given: q_token_ids [m, N, K, M] int32, q_probs [m, N, K, M] float32. Arrays of the host. Copies and stores
        run in order on the current stream, which may be another than the readers'; there is one writer.
        """
        version = self._versions[slots]
        halves = 2 * slots + (version // 2 + 1) % 2
        self._versions[slots] = version + 2
        headers = self._to_device(np.column_stack([version + 1, rounds]))
        rows = self._to_device(halves)
        _store(self.headers, rows, headers)
        _store(self.outcomes, rows, self._to_device(outcomes))
        _store(self.depths, rows, self._to_device(depths))
        _store(self.draft_token_ids, rows, self._to_device(draft_token_ids))
        if is_sampled.any():
            sampled_rows = self._to_device(halves[is_sampled])
            _store(self.q_token_ids, sampled_rows, self._to_device(q_token_ids))
            _store(self.q_probs, sampled_rows, self._to_device(q_probs))
        headers[:, 0] += 1
        _store(self.headers, rows, headers)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor, device = torch.from_numpy(array), self.headers.device
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _store(blocks: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite rows 2 * slot + half of `blocks` [S, 2, ...]."""
    blocks.flatten(0, 1).index_copy_(0, rows, values)
