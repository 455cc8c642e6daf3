"""Speculation blocks in the target's memory: what `lookup` reads while the next ones are being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
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
        keeps_q: np.ndarray,
        entries: np.ndarray,
        q_token_ids: Sequence[np.ndarray],
        q_probs: Sequence[np.ndarray],
    ) -> None:
        """Replace the older of the two blocks of each of `slots`; readers see a block whole or not at all.

        slots [n] int64, distinct; rounds [n, 2] int64, epoch and length; outcomes [n, N, 2], depths [n, N] and
        draft_token_ids [n, N, K] int32; keeps_q [n] bool: the proposals of the newer block stand, new ones come to
        them. Only the new ones are given, E drafts of the n requests together, in pieces: entries [E] int64,
        (i * N + branch) * K + draft of slots[i]; q_token_ids [E, M] int32, q_probs [E, M] float32. Arrays of the host.
        One copy to the device and the stores run in order on the current stream, which may be another than the
        readers'; there is one writer.
        """
        num_branches, num_drafts = draft_token_ids.shape[1:]
        version = self._versions[slots]
        halves = 2 * slots + (version // 2 + 1) % 2
        self._versions[slots] = version + 2
        header = np.column_stack([version + 1, rounds])
        request, place = np.divmod(entries, num_branches * num_drafts)
        kept = np.flatnonzero(keeps_q)
        shape = len(entries), self.q_probs.shape[-1]
        to_device = ToDevice(self.headers.device)
        to_device.add(header, header + (1, 0, 0), halves, halves[kept], halves[kept] ^ 1)
        to_device.add(halves[request] * (num_branches * num_drafts) + place)
        to_device.add(outcomes, depths, draft_token_ids)
        to_device.add_pieces(q_token_ids, np.int32, shape)
        to_device.add_pieces(q_probs, np.float32, shape)
        odd, even, rows, kept_rows, kept_from, q_rows, *values = to_device.tensors()
        _store(self.headers, rows, odd)
        for blocks, new in zip((self.outcomes, self.depths, self.draft_token_ids), values):
            _store(blocks, rows, new)
        for blocks, new in zip((self.q_token_ids, self.q_probs), values[3:]):
            if len(kept):
                _copy(blocks, kept_rows, kept_from)
            if len(entries):
                _store(blocks, q_rows, new)
        _store(self.headers, rows, even)


class ToDevice:
    """Arrays of the host on their way to a device in one copy, from pinned memory where that is a GPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: list[tuple[Sequence[np.ndarray], np.dtype, tuple[int, ...]]] = []

    def add(self, *arrays: np.ndarray) -> None:
        """Take arrays of 4 or 8 bytes an item, those of 8 first."""
        for array in arrays:
            self.add_pieces([array], array.dtype, array.shape)

    def add_pieces(self, pieces: Sequence[np.ndarray], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
        """Take an array that comes in pieces, one after the other."""
        self._parts.append((pieces, np.dtype(dtype), shape))

    def tensors(self) -> list[torch.Tensor]:
        """All of them, once the current stream has come to the copy."""
        sizes = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for _, dtype, shape in self._parts]
        staging = self._staging(sum(sizes))
        memory, start = staging.numpy(), 0
        spans = []
        for (pieces, dtype, _), size in zip(self._parts, sizes):
            if size:
                out = memory[start : start + size].view(dtype)
                np.concatenate([piece.reshape(-1) for piece in pieces], out=out)
            spans.append(slice(start, start + size))
            start += size
        on_device = staging if self._device.type == "cpu" else staging.to(self._device, non_blocking=True)
        return [on_device[span].view(_DTYPES[dtype]).view(shape) for (_, dtype, shape), span in zip(self._parts, spans)]

    def _staging(self, num_bytes: int) -> torch.Tensor:
        """Memory [num_bytes] uint8 that nothing else uses until the copy is through."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")


_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


def _store(blocks: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite rows of `blocks`, counted over all its dimensions that `values` [n, ...] lacks."""
    blocks.flatten(0, blocks.dim() - values.dim()).index_copy_(0, rows, values)


def _copy(blocks: torch.Tensor, rows: torch.Tensor, source: torch.Tensor) -> None:
    """Overwrite rows 2 * slot + half of `blocks` [S, 2, ...] with those of `source`."""
    _store(blocks, rows, blocks.flatten(0, 1).index_select(0, source))
