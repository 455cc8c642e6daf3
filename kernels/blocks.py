"""Speculation blocks in the target's device memory, which `lookup` reads while the next ones are being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class DeviceBlocks:
    """Two blocks for each of `S` requests: the newest complete one, and an older one or one that is being written.

    headers [S, 2, 3] int64: version, epoch, length. The version is a sequence lock: odd while the block is being
    written, and larger after every write. Epoch and length identify the round that the block is for.
    outcomes [S, 2, N, 2] int32: accept length and bonus token of each branch; depths [S, 2, N] int32: number of drafts
    so far. draft_token_ids [S, 2, N, K] int32; q_token_ids [S, 2, N, K, M] int32 and q_probs [S, 2, N, K, M] float32:
    the proposal of each draft, unused for greedy requests (M may be 0).

    Outcomes, depths and drafts share one allocation, as rows of N numbers, and the proposals another, so that each is
    written with a single store.
    """

    headers: torch.Tensor
    outcomes: torch.Tensor
    depths: torch.Tensor
    draft_token_ids: torch.Tensor
    q_token_ids: torch.Tensor
    q_probs: torch.Tensor
    _versions: np.ndarray = field(repr=False)  # [S] int64, of the newest block of each request
    _branches: torch.Tensor = field(repr=False)  # [2S * (3 + K) + 1, N]: outcomes, depths, drafts, one row for nothing
    _branch_rows: np.ndarray = field(repr=False)  # [2S, R] int64: which of them are whose, in the order of `write`
    _proposals: torch.Tensor = field(repr=False)  # [2, 2S, N * K * M]: token ids, and probabilities as int32

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
        s, n, k = num_requests, max_branches, num_speculative_tokens
        headers = torch.zeros(s, 2, 3, dtype=torch.int64, device=device) - torch.tensor([0, 1, 1], device=device)
        branches = torch.zeros(2 * s * (3 + k) + 1, n, dtype=torch.int32, device=device)
        outcomes, depths, draft_token_ids, _ = branches.split([4 * s, 2 * s, 2 * s * k, 1])
        outcomes -= 1
        halves = np.arange(2 * s)[:, None]
        rows = [2 * halves + np.arange(2), 4 * s + halves, 6 * s + k * halves + np.arange(k)]
        unused = np.full((2 * s, num_rows(k) - 3 - k), len(branches) - 1)
        proposals = torch.zeros(2, 2 * s, n * k * top_m, dtype=torch.int32, device=device)
        q_token_ids, q_probs = proposals.view(2, s, 2, n, k, top_m)
        return cls(
            headers,
            outcomes.view(s, 2, n, 2),
            depths.view(s, 2, n),
            draft_token_ids.view(s, 2, n, k),
            q_token_ids,
            q_probs.view(torch.float32),
            np.zeros(s, np.int64),
            branches,
            np.concatenate([*rows, unused], 1),
            proposals,
        )

    def host_branches(self) -> np.ndarray:
        """Empty branches of every request in the layout of `write`, [S, R, N] int32."""
        branches = np.zeros((len(self._versions), self._branch_rows.shape[1], self.outcomes.shape[2]), np.int32)
        branches[:, :2] = -1
        return branches

    def write(
        self,
        slots: np.ndarray,
        rounds: np.ndarray,
        branches: np.ndarray,
        keeps_q: np.ndarray,
        entries: np.ndarray,
        owners: np.ndarray,
        q_token_ids: Sequence[np.ndarray],
        q_probs: Sequence[np.ndarray],
    ) -> None:
        """Replace the older of the two blocks of each of `slots`; readers see a complete block or none.

        slots [n] int64: distinct slots; rounds [n, 2] int64: epoch and length; branches [n, R, N] int32: R rows of N
        numbers, two for outcomes [N, 2], one for depths [N], K for drafts [N, K], and an unused one if R would be odd;
        keeps_q [n] bool: keep the newer block's proposals and add the new ones to them.

        Only new proposals are given, E drafts of all requests, in pieces: entries [E] int64: (slot * N + branch) * K +
        draft; owners [E] int64: their slots; q_token_ids [E, M] int32; q_probs [E, M] float32. All arrays are on the
        host.

        One copy to the device and the stores run in order on the current stream, which need not be the readers'. There
        must be only one writer.
        """
        num_halves, (num_branches, num_drafts, top_m) = 2 * len(self._versions), self.q_probs.shape[2:]
        self._versions[slots] = version = self._versions[slots] + 2
        odd = version >> 1 & 1  # half of each block
        halves = 2 * slots + odd
        header = np.empty((2, len(slots), 3), np.int64)
        header[:, :, 1:] = rounds
        header[0, :, 0], header[1, :, 0] = version - 1, version
        longs = [header, halves, self._branch_rows[halves]]
        kept = halves[keeps_q]
        if len(kept):
            kept = np.concatenate((kept, kept + num_halves))
            longs += [kept, kept ^ 1]
        if len(entries):
            shift = np.empty(len(self._versions), np.int64)
            shift[slots] = (slots + odd) * (num_branches * num_drafts)
            q_rows = entries + shift[owners]
            longs += [q_rows, q_rows + num_halves * num_branches * num_drafts]
        numbers, words = to_device(self.headers.device, longs, [branches, *q_token_ids, *q_probs])
        sizes = [3 * len(slots), 3 * len(slots), len(slots), longs[2].size, len(kept), len(kept), 2 * len(entries)]
        begin, end, rows, branch_rows, kept_rows, kept_from, entry_rows = numbers.split_with_sizes(sizes)
        headers = self.headers.view(-1, 3)
        _store(headers, rows, begin.view(-1, 3))
        _store(self._branches, branch_rows, words[: branches.size].view(-1, num_branches))
        if top_m and len(kept):
            _copy(self._proposals.view(2 * num_halves, -1), kept_rows, kept_from)
        if top_m and len(entries):
            _store(self._proposals.view(-1, top_m), entry_rows, words[branches.size :].view(-1, top_m))
        _store(headers, rows, end.view(-1, 3))


def num_rows(num_drafts: int) -> int:
    """R, rows of N numbers for a request's branches: even, so that they begin at a multiple of 8 bytes."""
    return (4 + num_drafts) // 2 * 2


def to_device(
    device: torch.device, longs: Sequence[np.ndarray], words: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy int64 arrays and arrays of 4-byte items to the device, each kind concatenated: [n] int64 and [m] int32.

    A single copy on the current stream, asynchronous and from pinned memory for a GPU.
    """
    num_long_bytes = 8 * sum([array.size for array in longs])
    staging = _staging(num_long_bytes + 4 * sum([array.size for array in words]), device)
    memory = staging.numpy()
    np.concatenate([array.reshape(-1) for array in longs], out=memory[:num_long_bytes].view(np.int64))
    start = num_long_bytes
    for array in words:
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        start += array.nbytes
    on_device = staging if device.type == "cpu" else staging.to(device, non_blocking=True)
    return on_device[:num_long_bytes].view(torch.int64), on_device[num_long_bytes:].view(torch.int32)


def _staging(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Staging memory [num_bytes] uint8, which is not reused before a copy to the device has finished."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _store(table: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite rows of a table [n, width]."""
    table.index_copy_(0, rows, values)


def _copy(table: torch.Tensor, rows: torch.Tensor, source: torch.Tensor) -> None:
    """Overwrite rows of a table [n, width] with those of `source`."""
    _store(table, rows, table.index_select(0, source))
