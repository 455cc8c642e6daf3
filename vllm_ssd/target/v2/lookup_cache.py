"""Speculation blocks in the target's device memory: written as they arrive, read where the outcome is known.

The writer is a thread with a stream of its own, the reader a kernel (`kernels.lookup`) that vLLM's thread launched long
before: neither waits for the other. Of two blocks a request one is whole while the other is written, and a version
tells which.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_ssd.kernels import DeviceBlocks
from vllm_ssd.link.protocol import SpeculationBlock

Arrays = list[np.ndarray]

NO_OUTCOME = -1
"""Accept length and bonus token -1: what no outcome is."""


class SpeculationCache:
    """Two blocks for each of S request slots (`kernels.DeviceBlocks`), N branches of up to K drafts each.

    A block's epoch is the serial number of its request. The host knows the newest block of each slot but for its
    proposals, which pass through: they are most of the bytes, and each is copied once.
    """

    def __init__(
        self, num_slots: int, max_branches: int, num_drafts: int, top_m: int, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        shape = (num_slots, max_branches, num_drafts)
        self._outcomes = np.full(shape[:2], NO_OUTCOME, np.int64)  # each a pair of int32
        self._depths = np.zeros(shape[:2], np.int32)
        self._draft_token_ids = np.zeros(shape, np.int32)
        self._answers = np.full((num_slots, 2), -1, np.int64)  # serial number and length
        self._num_branches = np.zeros(num_slots, np.int64)
        self._keeps_q = np.zeros(num_slots, np.bool_)  # the device has proposals of the newest block
        self._top_m = top_m
        self._put: list[tuple[int, int, SpeculationBlock]] = []

        self.blocks = DeviceBlocks.empty(num_slots, max_branches, num_drafts, top_m, self.device)
        if self.device.type == "cuda":
            # Before the target's graphs, whose kernels would else hold up the next round's blocks.
            self._stream = torch.cuda.Stream(self.device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def put(self, slot: int, serial: int, block: SpeculationBlock) -> None:
        """Keep a pushed block for request `serial` in `slot`; readers see it after `flush`.

        Branches that do not continue what was pushed before, or exceed N, are left out.
        """
        self._put.append((slot, serial, block))

    def flush(self) -> None:
        """Bring what was put to the device, in the order of the cache's own stream; returns before it is there."""
        if not self._put:
            return
        put, self._put = self._put, []
        proposals = [self._take(alike) for alike in _alike(put)]
        slots = np.array(sorted({slot for slot, _, _ in put}))
        entries = [entries for entries, _, _ in proposals]
        index = np.zeros(len(self._answers), np.int64)
        index[slots] = np.arange(len(slots))
        slot, place = np.divmod(np.concatenate(entries), self._draft_token_ids[0].size)
        with torch.cuda.stream(self._stream):  # None changes nothing
            self.blocks.write(
                slots,
                self._answers[slots],
                self._outcomes[slots].view(np.int32).reshape(len(slots), -1, 2),
                self._depths[slots],
                self._draft_token_ids[slots],
                self._keeps_q[slots],
                index[slot] * self._draft_token_ids[0].size + place,
                [piece for _, pieces, _ in proposals for piece in pieces],
                [piece for _, _, pieces in proposals for piece in pieces],
            )
        self._keeps_q[slot] = True

    def _take(self, put: list[tuple[int, int, SpeculationBlock]]) -> tuple[np.ndarray, Arrays, Arrays]:
        """Note blocks of different slots that have one offset, depth and support.

        -> the places of their drafts with a proposal, [E] int64, (slot * N + branch) * K + draft, and in pieces the
        ids [E, M] int32 and the probabilities [E, M] float32.
        """
        blocks = [block for _, _, block in put]
        slots = np.array([slot for slot, _, _ in put])
        answers = np.array([serial for _, serial, _ in put] + [block.length for block in blocks]).reshape(2, -1).T
        counts = np.array([len(block.outcomes) for block in blocks]) // 8
        offset = blocks[0].offset
        outcomes = np.frombuffer(b"".join([block.outcomes for block in blocks]), "<i8")
        drafts = np.frombuffer(b"".join([block.draft_token_ids for block in blocks]), "<i4").reshape(len(outcomes), -1)
        stop = offset + drafts.shape[1]

        starts = slots[(self._answers[slots] != answers).any(1)]
        self._answers[slots] = answers
        self._outcomes[starts], self._depths[starts] = NO_OUTCOME, 0
        self._num_branches[starts], self._keeps_q[starts] = 0, False

        of_block = np.repeat(np.arange(len(blocks)), counts)
        at = slots[of_block]
        rows, is_new = self._rows(at, of_block, counts, outcomes)
        fits = rows < self._depths.shape[1]
        if not fits.all():
            rows = np.where(fits, rows, 0)
        branch = at * self._depths.shape[1] + rows
        fits &= self._depths.take(branch) == offset
        fits_all = bool(fits.all())
        if not fits_all:
            branch, outcomes, drafts, of_block, is_new = (
                array[fits] for array in (branch, outcomes, drafts, of_block, is_new)
            )
        self._outcomes.put(branch, outcomes)
        self._depths.put(branch, stop)
        num_drafts = self._draft_token_ids.shape[2]
        places = ((branch * num_drafts + offset)[:, None] + np.arange(stop - offset)).reshape(-1)
        self._draft_token_ids.put(places, drafts)
        if is_new.any():
            self._num_branches[slots] += np.bincount(of_block[is_new], minlength=len(slots))
        if not blocks[0].q_token_ids or not self._top_m:
            return places[:0], [], []
        q_token_ids: Arrays = [np.frombuffer(block.q_token_ids, "<i4") for block in blocks]
        q_probs: Arrays = [np.frombuffer(block.q_probs, "<f4") for block in blocks]
        if not fits_all or sum(map(len, q_probs)) != len(places) * self._top_m:
            q_token_ids = [self._whole(q_token_ids, fits, stop - offset)]
            q_probs = [self._whole(q_probs, fits, stop - offset)]
        return places, q_token_ids, q_probs

    def _rows(
        self, at: np.ndarray, of_block: np.ndarray, counts: np.ndarray, outcomes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The row of each branch in its slot's table, new ones after those that are there, and which are new."""
        position = np.arange(len(of_block)) - (np.cumsum(counts) - counts)[of_block]
        is_new = np.zeros(len(at), np.bool_)
        is_first = self._num_branches[at] == 0
        if is_first.all():
            return position, ~is_new
        # A drafter names the branches of a request in one order, and mostly all of them.
        rows = np.minimum(position, self._depths.shape[1] - 1)
        if (self._outcomes[at, rows] == outcomes).all():
            return rows, is_new
        held = self._outcomes[at] == outcomes[:, None]
        rows, is_new = held.argmax(1), ~held.any(1)
        number = np.cumsum(is_new)
        before = np.concatenate(([0], number))[(np.cumsum(counts) - counts)[of_block]]
        return np.where(is_new, self._num_branches[at] + number - before - 1, rows), is_new

    def _whole(self, pieces: Arrays, fits: np.ndarray, depth: int) -> np.ndarray:
        """Of arrays [n, depth, m] in pieces the branches that fit, [E, M], filled up with zeros."""
        array = np.concatenate(pieces).reshape(len(fits), depth, -1)[fits]
        whole = np.zeros((len(array) * depth, self._top_m), array.dtype)
        whole[:, : array.shape[2]] = array.reshape(len(whole), array.shape[2])
        return whole


def _alike(put: list[tuple[int, int, SpeculationBlock]]) -> list[list[tuple[int, int, SpeculationBlock]]]:
    """The blocks in groups that one pass can take: one offset, depth and support, and a slot at most once.

    Blocks of one slot stay in their order.
    """
    groups: list[list[tuple[int, int, SpeculationBlock]]] = []
    last: dict[tuple[int, int, int], int] = {}  # group of each kind
    newest: dict[int, int] = {}  # group of each slot's newest block
    for item in put:
        slot, _, block = item
        size = len(block.draft_token_ids)
        kind = block.offset, 2 * size // len(block.outcomes), len(block.q_token_ids) // size
        group = last.get(kind, -1)
        if group <= newest.get(slot, -1):
            group = last[kind] = len(groups)
            groups.append([])
        groups[group].append(item)
        newest[slot] = group
    return groups
