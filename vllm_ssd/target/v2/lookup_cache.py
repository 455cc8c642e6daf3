"""Speculation blocks in the target's device memory: written as they arrive, read where the outcome is known.

The writer is a thread with a stream of its own, the reader a kernel (`kernels.lookup`) that vLLM's thread launched long
before: neither waits for the other. Of two blocks a request one is whole while the other is written, and a version
tells which.
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
        self._put: list[Group] = []
        # What the last group left, where all its branches have a place: layout, serial numbers, lengths, depth and
        # outcomes. The blocks that lengthen just those are not searched for.
        self._expected: tuple[Layout, list[int], list[int], int, bytes] | None = None

        self.blocks = DeviceBlocks.empty(num_slots, max_branches, num_drafts, top_m, self.device)
        self._branches = self.blocks.host_branches()
        self._words = self._branches.reshape(-1)
        self._outcomes = self._words.view(np.int64)  # an outcome each, at the start of a slot's rows
        if self.device.type == "cuda":
            # Before the target's graphs, whose kernels would else hold up the next round's blocks.
            self._stream = torch.cuda.Stream(self.device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def put(
        self, push: Push, slots: list[int], serials: list[int], blocks: list[SpeculationBlock], firsts: list[int]
    ) -> None:
        """Keep blocks of `push` for requests `serials` in `slots`; readers see them after `flush`.

        firsts: of each block's proposals in the push. Branches that do not continue what was pushed before, or exceed
        N, are left out.
        """
        self._put.append(Group(push, slots, serials, blocks, firsts))

    def flush(self) -> None:
        """Bring what was put to the device, in the order of the cache's own stream; returns before it is there."""
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
        """Note the blocks of a group."""
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
        """Where blocks have their branches, and which branches have a place, [B] bool or None for all.

        A drafter names the branches of a request in one order, and mostly all of them.
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
        """The row of each branch of slots `at` among their branches, new ones after those there, and which are new."""
        held = self._branches[at, :2].reshape(len(at), -1).view(np.int64) == outcomes[:, None]
        rows, is_new = held.argmax(1), ~held.any(1)
        number = np.concatenate(([0], np.cumsum(is_new)))
        before = np.repeat(number[np.cumsum(counts) - counts], counts)
        return np.where(is_new, self._num_branches[at] + number[:-1] - before, rows), is_new

    def _proposals(
        self, group: Group, layout: Layout, fits: np.ndarray | None, depth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids and probabilities [E, M] of blocks `depth` drafts deep, of the branches that fit."""
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
    """What came with a group for `DeviceBlocks.write`: its slots, and the proposals of its drafts."""

    slots: np.ndarray
    entries: np.ndarray
    owners: np.ndarray
    q_token_ids: np.ndarray
    q_probs: np.ndarray


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


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How the branches of some blocks lie that are kept in their order, all of each block."""

    slots: np.ndarray  # [n] int64, of the blocks
    counts: np.ndarray  # [n] int64, branches of each
    most: int  # of these
    places: Places
    together: slice | None  # of the push's proposals; None where others lie between them


@functools.lru_cache(maxsize=4)  # from push to push and from round to round, most are the same
def _layout(
    slots: tuple[int, ...],
    sizes: tuple[int, ...],
    firsts: tuple[int, ...],
    depth: int,
    shape: tuple[int, int, int],
) -> Layout:
    """Of blocks `depth` drafts deep whose outcomes have `sizes` bytes, and whose proposals begin at `firsts`."""
    at, counts, first = np.array(slots), np.array(sizes) // 8, np.array(firsts)
    ends = first + counts * depth
    together = slice(firsts[0], int(ends[-1])) if (first[1:] == ends[:-1]).all() else None
    rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Layout(at, counts, int(counts.max()), _places(np.repeat(at, counts), rows, shape), together)


def _each(firsts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Every step from every first, flat."""
    return (firsts[:, None] + steps).reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Blocks of one push, in its order; `SpeculationCache._take` takes those that are alike in one pass."""

    push: Push
    slots: list[int]
    serials: list[int]
    blocks: list[SpeculationBlock]
    firsts: list[int]  # of each block's proposals in the push

    def is_alike(self) -> bool:
        """Whether the blocks are of one offset and depth, all sampled or none, each of another slot."""
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
    """What was put in as few groups as can be, each alike; blocks of one slot stay in their order."""
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
