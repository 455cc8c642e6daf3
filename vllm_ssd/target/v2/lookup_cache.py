"""Speculation blocks in the target's device memory, written as they arrive and read by `kernels.lookup`.

The writer is a thread with its own stream; the reader is a kernel that vLLM's thread may have launched long before.
Neither waits for the other: each request has two blocks, one of which is complete while the other is written, and a
version tells which.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vllm_ssd.kernels import DeviceBlocks
from vllm_ssd.kernels.blocks import num_rows
from vllm_ssd.link.protocol import Push, SpeculationBlock

NO_OUTCOME = -1
"""Accept length and bonus token of unused entries; no outcome has it."""
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
        self._keeps_q = np.zeros(num_slots, np.bool_)  # whether the newest block has proposals on the device
        self._shape = max_branches, num_drafts, top_m
        self._put: list[Group] = []
        # Layout, serial numbers, lengths, depth and outcomes of the last group, if all its branches fit. Blocks that
        # extend exactly these branches skip the search for their places.
        self._expected: tuple[Layout, list[int], list[int], int, bytes] | None = None

        self.blocks = DeviceBlocks.empty(num_slots, max_branches, num_drafts, top_m, self.device)
        self._branches = self.blocks.host_branches()
        self._words = self._branches.reshape(-1)
        self._outcomes = self._words.view(np.int64)  # each outcome as one item, at the start of a slot's rows
        if self.device.type == "cuda":
            # High priority, so that the target's graphs do not delay the next round's blocks.
            self._stream = torch.cuda.Stream(self.device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def put(
        self, push: Push, slots: list[int], serials: list[int], blocks: list[SpeculationBlock], firsts: list[int]
    ) -> None:
        """Queue blocks of `push` for requests `serials` in `slots`; readers see them after `flush`.

        firsts: index of each block's first proposal in the push. Branches that exceed N, or do not continue what was
        pushed before, are dropped.
        """
        self._put.append(Group(push, slots, serials, blocks, firsts))

    def flush(self) -> None:
        """Copy the queued blocks to the device on the cache's own stream; returns before they are there."""
        if not self._put:
            return
        put, self._put = self._put, []
        groups = _alike(put)
        taken = [self._take(group) for group in groups]
        slots, entries, owners = taken[0].slots, taken[0].entries, taken[0].owners
        if len(taken) > 1:
            slots = np.unique(np.concatenate([part.slots for part in taken]))
            entries = np.concatenate([part.entries for part in taken])
            owners = np.concatenate([part.owners for part in taken])
        with torch.cuda.stream(self._stream):  # None changes nothing
            self.blocks.write(
                slots,
                self._answers[slots],
                self._branches[slots],
                self._keeps_q[slots],
                entries,
                owners,
                [part.q_token_ids for part in taken],
                [part.q_probs for part in taken],
            )
        for group, part in zip(groups, taken):
            if group.blocks[0].sampled:
                self._keeps_q[part.slots] = True

    def _take(self, group: Group) -> Taken:
        """Store a group of blocks in the host's copy and return what to write to the device."""
        blocks, top_m = group.blocks, self._shape[2]
        of_outcomes, lengths = [block.outcomes for block in blocks], [block.length for block in blocks]
        outcomes, drafts = b"".join(of_outcomes), b"".join([block.draft_token_ids for block in blocks])
        offset, depth = blocks[0].offset, 2 * len(drafts) // len(outcomes)
        layout = _layout(tuple(group.slots), tuple(map(len, of_outcomes)), tuple(group.firsts), depth, self._shape)
        token_ids = np.frombuffer(drafts, "<i4").reshape(-1, depth)

        places, fits = layout.places, None
        if (layout, group.serials, lengths, offset, outcomes) != self._expected:
            places, fits = self._arrange(layout, group.serials, lengths, offset, np.frombuffer(outcomes, "<i8"))
            token_ids = token_ids if fits is None else token_ids[fits]
        steps = np.arange(offset, offset + depth)
        self._words[places.depths] = offset + depth
        self._words[_each(places.drafts, steps)] = token_ids.reshape(-1)
        self._expected = (layout, group.serials, lengths, offset + depth, outcomes) if fits is None else None
        if not blocks[0].sampled or not top_m:
            return Taken(layout.slots, NOTHING, NOTHING, NO_IDS, NO_PROBS)
        entries = _each(places.entries, steps)
        owners = places.slots if depth == 1 else places.slots.repeat(depth)
        return Taken(layout.slots, entries, owners, *self._proposals(group, layout, fits, depth))

    def _arrange(
        self, layout: Layout, serials: list[int], lengths: list[int], offset: int, outcomes: np.ndarray
    ) -> tuple[Places, np.ndarray | None]:
        """Assign places to the blocks' branches; also returns which branches fit, [B] bool, None for all.

        The fast path relies on a drafter sending a request's branches always in the same order, and mostly all of them.
        """
        slots, counts, places = layout.slots, layout.counts, layout.places
        max_branches = self._shape[0]
        answers = np.array([serials, lengths]).T
        starts = slots[(self._answers[slots] != answers).any(1)]
        if len(starts):
            self._answers[slots] = answers
            self._branches[starts, :2], self._branches[starts, 2] = NO_OUTCOME, 0
            self._num_branches[starts], self._keeps_q[starts] = 0, False

        if layout.most <= max_branches:
            if not offset and not self._num_branches[slots].any():
                self._outcomes[places.outcomes] = outcomes
                self._num_branches[slots] = counts
                return places, None
            is_next = (self._outcomes.take(places.outcomes) == outcomes) & (self._words.take(places.depths) == offset)
            if is_next.all():
                return places, None
        at = places.slots
        rows, is_new = self._rows(at, counts, outcomes)
        fits = rows < max_branches
        fits[fits] = self._branches[at[fits], 2, rows[fits]] == offset
        places = _places(at[fits], rows[fits], self._shape)
        self._outcomes[places.outcomes] = outcomes[fits]
        np.add.at(self._num_branches, at[is_new & fits], 1)
        return places, fits

    def _rows(self, at: np.ndarray, counts: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of each branch within its slot in `at`, new branches after existing ones, and which are new."""
        held = self._branches[at, :2].reshape(len(at), -1).view(np.int64) == outcomes[:, None]
        rows, is_new = held.argmax(1), ~held.any(1)
        number = np.concatenate(([0], np.cumsum(is_new)))
        before = np.repeat(number[np.cumsum(counts) - counts], counts)
        return np.where(is_new, self._num_branches[at] + number[:-1] - before, rows), is_new

    def _proposals(
        self, group: Group, layout: Layout, fits: np.ndarray | None, depth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Proposals of the branches that fit, ids and probabilities [E, M]; depth: drafts per branch."""
        push, counts = group.push, layout.counts
        arrays = [
            np.frombuffer(array, dtype).reshape(-1, push.support)
            for array, dtype in ((push.q_token_ids, "<i4"), (push.q_probs, "<f4"))
        ]
        if fits is None and layout.together is not None:
            arrays = [array[layout.together] for array in arrays]
        else:
            firsts, sizes = np.array(group.firsts), counts * depth
            branches = np.repeat(firsts - np.cumsum(sizes) + sizes, counts) + np.arange(counts.sum()) * depth
            drafts = _each(branches if fits is None else branches[fits], np.arange(depth))
            arrays = [array[drafts] for array in arrays]
        if push.support < self._shape[2]:
            arrays = [np.pad(array, ((0, 0), (0, self._shape[2] - push.support))) for array in arrays]
        return arrays[0], arrays[1]


class Taken(NamedTuple):
    """Arguments for `DeviceBlocks.write` from one group: its slots, and its drafts' proposals."""

    slots: np.ndarray
    entries: np.ndarray
    owners: np.ndarray
    q_token_ids: np.ndarray
    q_probs: np.ndarray


class Places(NamedTuple):
    """Locations of branches, each [B] int64; indices into the host's words except for slots and entries."""

    slots: np.ndarray
    outcomes: np.ndarray  # in units of 8 bytes
    depths: np.ndarray
    drafts: np.ndarray  # first draft of each branch
    entries: np.ndarray  # entry of the first draft, as in `DeviceBlocks.write`


def _places(slots: np.ndarray, rows: np.ndarray, shape: tuple[int, int, int]) -> Places:
    """The locations of branches, given their slots and rows, both [B] int64."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Locations of the branches of some blocks if each block keeps all its branches in order."""

    slots: np.ndarray  # [n] int64, slot of each block
    counts: np.ndarray  # [n] int64, branches of each block
    most: int  # largest of `counts`
    places: Places
    together: slice | None  # the blocks' proposals in the push; None if they are not contiguous


@functools.lru_cache(maxsize=4)  # layouts mostly repeat from push to push and from round to round
def _layout(
    slots: tuple[int, ...],
    sizes: tuple[int, ...],
    firsts: tuple[int, ...],
    depth: int,
    shape: tuple[int, int, int],
) -> Layout:
    """The layout of blocks; sizes: bytes of their outcomes; firsts: first proposals; depth: drafts per branch."""
    at, counts, first = np.array(slots), np.array(sizes) // 8, np.array(firsts)
    ends = first + counts * depth
    together = slice(firsts[0], int(ends[-1])) if (first[1:] == ends[:-1]).all() else None
    rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Layout(at, counts, int(counts.max()), _places(np.repeat(at, counts), rows, shape), together)


def _each(firsts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """All sums of `firsts` and `steps`, flat."""
    return (firsts[:, None] + steps).reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Blocks of one push, in its order; `SpeculationCache._take` requires a group that `is_alike`."""

    push: Push
    slots: list[int]
    serials: list[int]
    blocks: list[SpeculationBlock]
    firsts: list[int]  # index of each block's first proposal in the push

    def is_alike(self) -> bool:
        """Whether all blocks have the same offset and depth, all or none are sampled, and their slots are distinct."""
        blocks, number = self.blocks, len(self.blocks)
        offsets, sampled = [block.offset for block in blocks], [block.sampled for block in blocks]
        if not len(set(self.slots)) == offsets.count(offsets[0]) == sampled.count(sampled[0]) == number:
            return False
        sizes = [len(block.outcomes) for block in blocks]
        drafts = [len(block.draft_token_ids) for block in blocks]
        if sizes.count(sizes[0]) == drafts.count(drafts[0]) == number:
            return True
        return len({2 * num_bytes // size for size, num_bytes in zip(sizes, drafts)}) == 1


def _alike(put: list[Group]) -> list[Group]:
    """Regroup the blocks into as few alike groups as possible; blocks of one slot stay in order."""
    if len(put) == 1 and put[0].is_alike():
        return put
    groups: list[Group] = []
    last: dict[tuple[int, int, int, bool], int] = {}  # group of each kind
    newest: dict[int, int] = {}  # group of each slot's newest block
    for part in put:
        for slot, serial, block, first in zip(part.slots, part.serials, part.blocks, part.firsts):
            depth = 2 * len(block.draft_token_ids) // len(block.outcomes)
            kind = id(part.push), block.offset, depth, block.sampled
            group = last.get(kind, -1)
            if group <= newest.get(slot, -1):
                group = last[kind] = len(groups)
                groups.append(Group(part.push, [], [], [], []))
            to = groups[group]
            to.slots.append(slot)
            to.serials.append(serial)
            to.blocks.append(block)
            to.firsts.append(first)
            newest[slot] = group
    return groups
