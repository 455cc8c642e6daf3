"""Speculation blocks in the target's device memory: written as they arrive, read where the outcome is known.

The writer is a thread with a stream of its own, the reader a kernel (`kernels.lookup`) that vLLM's thread launched long
before: neither waits for the other. Of two blocks a request one is whole while the other is written, and a version
tells which.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from vllm_ssd.kernels import DeviceBlocks
from vllm_ssd.kernels.blocks import num_rows
from vllm_ssd.link.protocol import Push, SpeculationBlock

Put = tuple[int, int, SpeculationBlock, Push, int]
"""Slot, serial number, block, the push that it came in and its first proposal there."""

NO_OUTCOME = -1
"""Accept length and bonus token -1: what no outcome is."""
NOTHING, NO_IDS, NO_PROBS = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)


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
        self._answers = np.full((num_slots, 2), -1, np.int64)  # serial number and length
        self._num_branches = np.zeros(num_slots, np.int64)
        self._keeps_q = np.zeros(num_slots, np.bool_)  # the device has proposals of the newest block
        self._shape = max_branches, num_drafts, top_m
        self._put: list[Put] = []

        self.blocks = DeviceBlocks.empty(num_slots, max_branches, num_drafts, top_m, self.device)
        self._branches = self.blocks.host_branches()
        self._words = self._branches.reshape(-1)
        self._outcomes = self._words.view(np.int64)  # an outcome each, at the start of a slot's rows
        if self.device.type == "cuda":
            # Before the target's graphs, whose kernels would else hold up the next round's blocks.
            self._stream = torch.cuda.Stream(self.device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def put(self, slot: int, serial: int, block: SpeculationBlock, push: Push, first: int = 0) -> None:
        """Keep a block of `push` for request `serial` in `slot`; readers see it after `flush`.

        first: of the block's proposals in the push. Branches that do not continue what was pushed before, or exceed N,
        are left out.
        """
        self._put.append((slot, serial, block, push, first))

    def flush(self) -> None:
        """Bring what was put to the device, in the order of the cache's own stream; returns before it is there."""
        if not self._put:
            return
        put, self._put = self._put, []
        groups = _alike(put)
        taken = [self._take(group) for group in groups]
        slots = groups[0].slots if len(groups) == 1 else np.unique([slot for slot, *_ in put])
        entries = taken[0][0] if len(taken) == 1 else np.concatenate([entries for entries, _, _ in taken])
        with torch.cuda.stream(self._stream):  # None changes nothing
            self.blocks.write(
                slots,
                self._answers[slots],
                self._branches[slots],
                self._keeps_q[slots],
                entries,
                [q_token_ids for _, q_token_ids, _ in taken],
                [q_probs for _, _, q_probs in taken],
            )
        for group in groups:
            if group.blocks[0].sampled:
                self._keeps_q[group.slots] = True

    def _take(self, group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Note the blocks of a group.

        -> the places of their drafts with a proposal, [E] int64 as `DeviceBlocks.write` takes them, the ids [E, M]
        int32 and the probabilities [E, M] float32.
        """
        slots, blocks, (max_branches, _, top_m) = group.slots, group.blocks, self._shape
        sizes = [len(block.outcomes) for block in blocks]
        counts = np.array(sizes) // 8
        outcomes = np.frombuffer(b"".join([block.outcomes for block in blocks]), "<i8")
        drafts = np.frombuffer(b"".join([block.draft_token_ids for block in blocks]), "<i4").reshape(len(outcomes), -1)
        offset, depth = blocks[0].offset, drafts.shape[1]

        answers = np.array([group.serials, [block.length for block in blocks]]).T
        starts = slots[(self._answers[slots] != answers).any(1)]
        if len(starts):
            self._answers[slots] = answers
            self._branches[starts, :2], self._branches[starts, 2] = NO_OUTCOME, 0
            self._num_branches[starts], self._keeps_q[starts] = 0, False

        # A drafter names the branches of a request in one order, and mostly all of them.
        places, fits = _in_order(tuple(slots.tolist()), tuple(sizes), self._shape), None
        if max(sizes) <= 8 * max_branches and not offset and not self._num_branches[slots].any():
            self._outcomes.put(places.outcomes, outcomes)
            self._num_branches[slots] = counts
        elif max(sizes) > 8 * max_branches or not (
            (self._outcomes.take(places.outcomes) == outcomes).all()
            and (self._words.take(places.depths) == offset).all()
        ):
            at = places.slots
            rows, is_new = self._rows(at, counts, outcomes)
            fits = rows < max_branches
            fits[fits] = self._branches[at[fits], 2, rows[fits]] == offset
            places, outcomes, drafts = _places(at[fits], rows[fits], self._shape), outcomes[fits], drafts[fits]
            self._outcomes.put(places.outcomes, outcomes)
            np.add.at(self._num_branches, at[is_new & fits], 1)
        span = np.arange(offset, offset + depth)
        self._words.put(places.depths, offset + depth)
        self._words.put(places.drafts[:, None] + span, drafts)
        if not blocks[0].sampled or not top_m:
            return NOTHING, NO_IDS, NO_PROBS
        return (places.entries[:, None] + span).reshape(-1), *self._proposals(group, counts, fits, depth)

    def _rows(self, at: np.ndarray, counts: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of each branch of slots `at` among their branches, new ones after those there, and which are new."""
        held = self._branches[at, :2].reshape(len(at), -1).view(np.int64) == outcomes[:, None]
        rows, is_new = held.argmax(1), ~held.any(1)
        number = np.concatenate(([0], np.cumsum(is_new)))
        before = np.repeat(number[np.cumsum(counts) - counts], counts)
        return np.where(is_new, self._num_branches[at] + number[:-1] - before, rows), is_new

    def _proposals(
        self, group: Group, counts: np.ndarray, fits: np.ndarray | None, depth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids and probabilities [E, M] of blocks of `counts` branches and `depth`, of the branches that fit."""
        push, firsts, sizes = group.push, np.array(group.firsts), counts * depth
        arrays = [
            np.frombuffer(array, dtype).reshape(-1, push.support)
            for array, dtype in ((push.q_token_ids, "<i4"), (push.q_probs, "<f4"))
        ]
        if fits is None and (firsts[1:] == (firsts + sizes)[:-1]).all():  # they lie together, as mostly
            arrays = [array[firsts[0] : firsts[-1] + sizes[-1]] for array in arrays]
        else:
            branches = np.repeat(firsts - np.cumsum(sizes) + sizes, counts) + np.arange(counts.sum()) * depth
            drafts = (branches if fits is None else branches[fits])[:, None] + np.arange(depth)
            arrays = [array[drafts.reshape(-1)] for array in arrays]
        if push.support < self._shape[2]:
            arrays = [np.pad(array, ((0, 0), (0, self._shape[2] - push.support))) for array in arrays]
        return arrays[0], arrays[1]


class Places(NamedTuple):
    """Where branches are kept, each [B] int64; indices into the host's words but for slots and entries."""

    slots: np.ndarray
    outcomes: np.ndarray  # in units of 8 bytes
    depths: np.ndarray
    drafts: np.ndarray  # of each branch the first
    entries: np.ndarray  # of its first draft, as `DeviceBlocks.write` counts them


def _places(slots: np.ndarray, rows: np.ndarray, shape: tuple[int, int, int]) -> Places:
    """Of the branches in these rows of these slots, [B] int64 both."""
    num_branches, num_drafts, _ = shape
    start = slots * (num_rows(num_drafts) * num_branches)
    first = rows * num_drafts
    return Places(
        slots,
        start // 2 + rows,
        start + 2 * num_branches + rows,
        start + 3 * num_branches + first,
        slots * (num_branches * num_drafts) + first,
    )


@functools.lru_cache(maxsize=4)  # from push to push and from round to round, most are the same
def _in_order(slots: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, int, int]) -> Places:
    """Of all branches of blocks whose outcomes have `sizes` bytes, in their order."""
    counts = np.array(sizes) // 8
    rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return _places(np.repeat(np.array(slots), counts), rows, shape)


class Group(NamedTuple):
    """Blocks that one pass can take: of one push, offset and depth, all sampled or none, each of another slot."""

    slots: np.ndarray
    serials: tuple[int, ...]
    blocks: tuple[SpeculationBlock, ...]
    push: Push
    firsts: tuple[int, ...]  # of each block's proposals in the push


def _alike(put: list[Put]) -> list[Group]:
    """What was put in as few groups as can be; blocks of one slot stay in their order."""
    kinds = [
        (id(push), block.offset, 2 * len(block.draft_token_ids) // len(block.outcomes), block.sampled)
        for _, _, block, push, _ in put
    ]
    if len(set(kinds)) == 1 and len({slot for slot, *_ in put}) == len(put):
        return [_group(put)]
    groups: list[list[Put]] = []
    last: dict[tuple[int, int, int, bool], int] = {}  # group of each kind
    newest: dict[int, int] = {}  # group of each slot's newest block
    for item, kind in zip(put, kinds):
        slot = item[0]
        group = last.get(kind, -1)
        if group <= newest.get(slot, -1):
            group = last[kind] = len(groups)
            groups.append([])
        groups[group].append(item)
        newest[slot] = group
    return [_group(group) for group in groups]


def _group(put: list[Put]) -> Group:
    slots, serials, blocks, pushes, firsts = zip(*put)
    return Group(np.array(slots), serials, blocks, pushes[0], firsts)
