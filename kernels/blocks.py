"""Speculation blocks in the target's memory: what `lookup` reads while the next ones are being written."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    _versions: list[int] = field(repr=False)

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
            [0] * num_requests,
        )

    def write(
        self,
        slot: int,
        epoch: int,
        length: int,
        outcomes: torch.Tensor,
        depths: torch.Tensor,
        draft_token_ids: torch.Tensor,
        q_token_ids: torch.Tensor | None = None,
        q_probs: torch.Tensor | None = None,
    ) -> None:
        """Replace the older of the two blocks of `slot`; readers see it whole or not at all.

        outcomes [n, 2], depths [n], draft_token_ids [n, d], q_token_ids and q_probs [n, d, M], n <= N and d <= K. Runs
        in stream order on the current stream, which may be another than the readers'. One writer a slot.
        """
        half = (self._versions[slot] // 2 + 1) % 2
        n, d = draft_token_ids.shape
        header = self.headers[slot, half]
        header[0] = self._versions[slot] + 1
        self.depths[slot, half] = 0
        self.outcomes[slot, half, :n] = outcomes
        self.depths[slot, half, :n] = depths
        self.draft_token_ids[slot, half, :n, :d] = draft_token_ids
        if q_token_ids is not None:
            self.q_token_ids[slot, half, :n, :d] = q_token_ids
            self.q_probs[slot, half, :n, :d] = q_probs
        header[1] = epoch
        header[2] = length
        self._versions[slot] += 2
        header[0] = self._versions[slot]
