"""Speculation blocks in the target's device memory: written as they arrive, read where the outcome is known.

The writer is a thread with a stream of its own, the reader a kernel that vLLM's thread launched long before: neither
waits for the other. Of two blocks a request one is whole while the other is written, and a version tells which.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_ssd.protocol import Block


@dataclass(frozen=True, slots=True)
class Speculation:
    """Up to K drafts for each of R requests, and the proposals they were drawn from.

    draft_token_ids [R, K] int32, q_token_ids [R, K, M] int32, q_probs [R, K, M] float32, num_drafts [R] int32. Entries
    beyond the last draft mean nothing.
    """

    draft_token_ids: torch.Tensor
    q_token_ids: torch.Tensor
    q_probs: torch.Tensor
    num_drafts: torch.Tensor

    @classmethod
    def empty(cls, num_requests: int, num_drafts: int, top_m: int, device: torch.device) -> Speculation:
        """No drafts."""
        shape = (num_requests, num_drafts)
        return cls(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(*shape, top_m, dtype=torch.int32, device=device),
            torch.zeros(*shape, top_m, device=device),
            torch.zeros(num_requests, dtype=torch.int32, device=device),
        )

    def __getitem__(self, rows: torch.Tensor) -> Speculation:
        """The speculations of some requests, in the order of `rows` [R'] int64."""
        return Speculation(
            self.draft_token_ids[rows], self.q_token_ids[rows], self.q_probs[rows], self.num_drafts[rows]
        )


class SpeculationCache:
    """Two blocks for each of S request slots, N branches of up to K drafts each.

    headers [S * 2, 3] int64: version, serial number of the request, committed length that the block answers; a version
    is odd while its block is being written, and grows. outcomes [S * 2, N, 2] int32: accept length and bonus token;
    depths [S * 2, N] int32: drafts of a branch; draft_token_ids [S * 2, N, K] int32; q_token_ids [S * 2, N, K, M] int32
    and q_probs [S * 2, N, K, M] float32: their proposals, unused where the request is greedy.
    """

    def __init__(
        self, num_slots: int, max_branches: int, num_drafts: int, top_m: int, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        shape = (num_slots, max_branches, num_drafts)
        self._outcomes = np.full((num_slots, max_branches, 2), -1, np.int32)
        self._depths = np.zeros(shape[:2], np.int32)
        self._draft_token_ids = np.zeros(shape, np.int32)
        self._q_token_ids = np.zeros((*shape, top_m), np.int32)
        self._q_probs = np.zeros((*shape, top_m), np.float32)
        self._answers = np.full((num_slots, 2), -1, np.int64)  # serial number and length
        self._num_branches = np.zeros(num_slots, np.int64)
        self._sampled = np.zeros(num_slots, np.bool_)
        self._versions = np.zeros(num_slots, np.int64)
        self._dirty: set[int] = set()

        def twice(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.repeat(array, 2, axis=0)).to(self.device)

        self.headers = twice(np.full((num_slots, 3), -1, np.int64))
        self.outcomes = twice(self._outcomes)
        self.depths = twice(self._depths)
        self.draft_token_ids = twice(self._draft_token_ids)
        self.q_token_ids = twice(self._q_token_ids)
        self.q_probs = twice(self._q_probs)
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    # ---- writing ---------------------------------------------------------------------------------------

    def put(self, slot: int, serial: int, block: Block) -> None:
        """Keep a pushed block for request `serial` in `slot`; readers see it after `flush`.

        Branches that do not continue what was pushed before, or exceed N, are left out.
        """
        outcomes = np.frombuffer(block.outcomes, "<i4").reshape(-1, 2)
        drafts = np.frombuffer(block.draft_token_ids, "<i4").reshape(len(outcomes), -1)
        if (self._answers[slot] != (serial, block.length)).any():
            self._answers[slot] = serial, block.length
            self._outcomes[slot], self._depths[slot], self._num_branches[slot] = -1, 0, 0
        held = (self._outcomes[slot] == outcomes[:, None]).all(2)
        rows, new = held.argmax(1), ~held.any(1)
        rows[new] = self._num_branches[slot] + np.arange(new.sum())
        fits = rows < self._depths.shape[1]
        fits[fits] = self._depths[slot, rows[fits]] == block.offset
        rows, stop = rows[fits], block.offset + drafts.shape[1]
        self._outcomes[slot, rows] = outcomes[fits]
        self._depths[slot, rows] = stop
        self._draft_token_ids[slot, rows, block.offset : stop] = drafts[fits]
        self._num_branches[slot] += (new & fits).sum()
        self._sampled[slot] = block.q_token_ids != b""
        if self._sampled[slot]:
            q_token_ids = np.frombuffer(block.q_token_ids, "<i4").reshape(*drafts.shape, -1)
            q_probs = np.frombuffer(block.q_probs, "<f4").reshape(*drafts.shape, -1)
            top_m = q_probs.shape[2]
            self._q_token_ids[slot, rows, block.offset : stop, :top_m] = q_token_ids[fits]
            self._q_probs[slot, rows, block.offset : stop, :top_m] = q_probs[fits]
        self._dirty.add(slot)

    def flush(self) -> None:
        """Bring what was put to the device, in the order of the cache's own stream; returns before it is there."""
        if not self._dirty:
            return
        slots = np.array(sorted(self._dirty))
        self._dirty.clear()
        halves = 2 * slots + (self._versions[slots] // 2 + 1) % 2
        headers = np.concatenate([self._versions[slots, None] + 1, self._answers[slots]], 1)
        self._versions[slots] += 2
        sampled = self._sampled[slots]
        with torch.cuda.stream(self._stream):  # None changes nothing
            rows, headers = self._to_device(halves), self._to_device(headers)
            self.headers.index_copy_(0, rows, headers)
            self.outcomes.index_copy_(0, rows, self._to_device(self._outcomes[slots]))
            self.depths.index_copy_(0, rows, self._to_device(self._depths[slots]))
            self.draft_token_ids.index_copy_(0, rows, self._to_device(self._draft_token_ids[slots]))
            if sampled.any():
                q_rows = self._to_device(halves[sampled])
                self.q_token_ids.index_copy_(0, q_rows, self._to_device(self._q_token_ids[slots[sampled]]))
                self.q_probs.index_copy_(0, q_rows, self._to_device(self._q_probs[slots[sampled]]))
            headers[:, 0] += 1
            self.headers.index_copy_(0, rows, headers)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._stream is None else tensor.pin_memory().to(self.device, non_blocking=True)

    # ---- reading ---------------------------------------------------------------------------------------

    def lookup(
        self,
        slots: torch.Tensor,
        serials: torch.Tensor,
        lengths: torch.Tensor,
        accept_lengths: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        old: Speculation,
    ) -> tuple[torch.Tensor, Speculation]:
        """What was speculated for the outcomes of R requests, without the host reading anything.

        slots, serials, lengths [R] int64: each request's place, its serial number and the committed length at which the
        decided round began; a block of another serial number or length never matches. accept_lengths,
        bonus_token_ids [R] int32: the outcome. old: what had been speculated for that round, of which fewer may have
        been verified: when the bonus token is the next of them, the rest of them stands. A block that is overwritten
        during the read counts as missing.

        -> whether there is a block for the round [R] bool, the drafts of the next one.
        """
        headers = self.headers.view(-1, 2, 3)[slots]
        whole = (
            (headers[..., 0] % 2 == 0) & (headers[..., 1] == serials[:, None]) & (headers[..., 2] == lengths[:, None])
        )
        versions, half = torch.where(whole, headers[..., 0], -1).max(1)
        at = 2 * slots + half
        outcome = torch.stack((accept_lengths, bonus_token_ids), 1)
        depths = self.depths[at]
        match = (self.outcomes[at] == outcome[:, None]).all(2) & (depths > 0)
        branch = match.int().argmax(1)
        found = Speculation(
            self.draft_token_ids[at, branch],
            self.q_token_ids[at, branch],
            self.q_probs[at, branch],
            depths.gather(1, branch[:, None])[:, 0],
        )
        present = whole.any(1) & (self.headers[at, 0] == versions)
        return present, _rest_or(found, present & match.any(1), outcome, old)


def _rest_or(found: Speculation, hit: torch.Tensor, outcome: torch.Tensor, old: Speculation) -> Speculation:
    """`found` where `hit` [R] says so, or the rest of `old` where the bonus token is its next draft."""
    num_drafts = old.draft_token_ids.shape[1]
    first = outcome[:, :1].long() + 1  # of the rest
    bonus_at = (first - 1).clamp(0, num_drafts - 1)
    is_rest = (first <= old.num_drafts[:, None]) & (old.draft_token_ids.gather(1, bonus_at) == outcome[:, 1:])
    is_rest &= first > 0  # an accept length of -1: nothing was decided
    at = (first + torch.arange(num_drafts, device=first.device)).clamp(max=num_drafts - 1)
    wide = at[:, :, None].expand_as(old.q_token_ids)
    rest = (is_rest & (first < old.num_drafts[:, None]))[:, 0]
    return Speculation(
        torch.where(rest[:, None], old.draft_token_ids.gather(1, at), found.draft_token_ids),
        torch.where(rest[:, None, None], old.q_token_ids.gather(1, wide), found.q_token_ids),
        torch.where(rest[:, None, None], old.q_probs.gather(1, wide), found.q_probs),
        torch.where(rest, old.num_drafts - first[:, 0].int(), torch.where(hit & ~is_rest[:, 0], found.num_drafts, 0)),
    )
