"""KV pages of spines and branches whose page tables live on the device; the host only counts pages."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from vllm_ssd.compat.drafter.paged import PagedModel, TreeBatch
from vllm_ssd.drafter.branches import JIT_ACCEPT_LENGTH, Branches
from vllm_ssd.drafter.pages.pool import NO_PAGES
from vllm_ssd.drafter.pages.spines import SpinePages
from vllm_ssd.drafter.step_tokens import StepTokens
from vllm_ssd.kernels import CLOSE, MISS, SKIP, DevicePool, Trees, adopt, commit, drop, expand, keep, reserve


class DevicePages(SpinePages):
    """`Pages` over `kernels.Trees`: page ids never come to the host.

    Operations are collected and carried out before the next forward, with one launch each of `commit`, `drop`, `adopt`,
    `reserve`, `expand` and `copy_pages` for all requests. The host never waits for the device: it knows how many pages
    each operation takes, and `tables` contain stand-ins that are shared and released like the real pages.

    A page's stand-in is also its name in the device's prefix cache. A page enters that cache only when the spine that
    published it ends or another spine adopts it, so most rounds launch nothing for the cache.
    """

    def __init__(self, model: PagedModel, branches: Branches) -> None:
        super().__init__(model, branches.max_num_seqs)
        self._branches = branches
        self._num_drafts = k = branches.num_speculative_tokens
        num_slots, per_slot = branches.max_num_seqs, branches.per_request
        self.device_pool = DevicePool.full(model.num_pages, model.device)
        self.trees = Trees.empty(num_slots, per_slot, k, model.page_size, self.tables.shape[1], model.device)
        self._index = np.zeros(num_slots * per_slot, np.int64)  # index of each row among its request's branches
        self._num_branch_pages = np.zeros(num_slots * per_slot, np.int64)
        self._held_by_branches = 0
        self._places = np.zeros((2, model.num_pages), np.int64)  # slot and column of each published page, by its name
        self._is_kept = np.zeros(model.num_pages, bool)  # in the device's cache, by name
        self._kept_pages = torch.zeros(model.num_pages, dtype=torch.int32, device=model.device)  # by name
        # Pending operations, by slot; `_fan_out` also contains completed ones.
        self._winners = np.full(num_slots, SKIP, np.int32)
        self._adopted: list[np.ndarray] = []  # slots, columns and names [3, n]
        self._dropped: list[np.ndarray] = []  # names [n]
        self._num_tokens = np.zeros(num_slots, np.int32)
        self._lengths = np.zeros(num_slots, np.int32)
        self._forks = np.zeros((num_slots, 2), np.int32)
        self._fan_out = np.zeros((num_slots, k + 1), np.int32)
        self._candidates = np.full((num_slots, k + 1, branches.num_candidates + 1), -1, np.int32)
        self._filled_base: set[int] = set()  # slots whose branch also copies the slot of its base
        self._copied: list[np.ndarray] = []  # forked branches whose first page is not empty, slot * N + index

    @property
    def num_free(self) -> int:
        """Pages that no spine or branch will hold once all pending operations are carried out."""
        return self.pool.num_free - self._held_by_branches

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Give a spine the pages it lacks; as many must be free."""
        if self.missing(slot, num_tokens):
            super().reserve(slot, num_tokens)
            self._num_tokens[slot] = num_tokens

    def adopt(self, slot: int, digests: Iterable[bytes]) -> int:
        """See `Pages.adopt`."""
        have, num_pages = int(self.num_pages[slot]), super().adopt(slot, digests)
        if num_pages:
            columns = np.arange(have, have + num_pages)
            names = self.tables[slot, columns]
            self._keep(names)
            self._adopted.append(np.stack([np.full(num_pages, slot), columns, names]))
        return num_pages

    def publish(self, slot: int, first: int, digests: SequenceOf[bytes]) -> np.ndarray:
        """See `Pages.publish`; returns the pages that were added to the cache, [n] int32."""
        names = super().publish(slot, first, digests)
        self._places[0, self.tables[slot, first : first + len(digests)]] = slot
        self._places[1, self.tables[slot, first : first + len(digests)]] = np.arange(first, first + len(digests))
        return names

    def forget_idle(self) -> None:
        """Drop the cached pages that no spine holds."""
        self._make_room(self.pool.num_free - self._held_by_branches)

    def _keep(self, names: np.ndarray) -> None:
        """Add those of the pages `names` [n] that are cached to the device's cache."""
        names = names[self.pool.is_cached(names) & ~self._is_kept[names]]
        if len(names):
            self.carry_out()  # the pages must exist first, and earlier pages of the same names be dropped
            self._is_kept[names] = True
            entries = self._to_device(np.stack([*self._places[:, names], names]))
            keep(self.device_pool, self.trees, self._kept_pages, *entries)

    def _make_room(self, num_pages: int) -> None:
        """Drop idle pages so that, once pending operations are carried out, the device has `num_pages` unused ones."""
        names = self.pool.make_room(num_pages + self._held_by_branches)
        if len(names):
            self._is_kept[names] = False
            self._dropped.append(names)

    def _allocate(self, num_pages: int) -> np.ndarray:
        self._make_room(num_pages)
        return super()._allocate(num_pages)

    def needed(self, rows: np.ndarray) -> int:
        """Pages that `fork` takes for new branches in `rows`, always with room for K drafts."""
        base = int(self._branches.base[rows[0]])
        return len(rows) * ((base % self.page_size + self._num_drafts) // self.page_size + 1)

    def fork(self, rows: np.ndarray) -> None:
        """See `Pages.fork`."""
        branches, first = self._branches, rows[0]
        slot, base = int(branches.owner[first]), int(branches.base[first])
        is_jit = branches.accept_length[first] == JIT_ACCEPT_LENGTH
        k = 0 if is_jit else int(branches.accept_length[first])
        self._index[rows] = self._fan_out[slot].sum() + np.arange(len(rows))
        needed = self.needed(rows)
        self._make_room(needed)
        self._num_branch_pages[rows] = needed // len(rows)
        self._held_by_branches += needed
        self._lengths[slot] = base - k
        begin, end = self._forks[slot]
        self._forks[slot] = (begin if begin < end else k, k + 1)
        self._fan_out[slot, k] = len(rows)
        self._candidates[slot, k, : len(rows)] = branches.tokens[rows, 0]
        if is_jit:
            self._filled_base.add(slot)
        if is_jit or base % self.page_size:
            self._copied.append(slot * branches.per_request + self._index[rows])

    def index(self, rows: np.ndarray) -> np.ndarray:
        """Indices of the branches `rows` [n] among their requests' branches in `trees`, [n] int64."""
        return self._index[rows]

    def commit(self, slot: int, rows: np.ndarray, winner: int = -1) -> None:
        """Free the branches in `rows`; a `winner` among them becomes the spine from the page of its base on."""
        if not len(rows):
            return
        self._before_commit(slot)
        self._held_by_branches -= int(self._num_branch_pages[rows].sum())
        if winner >= 0:
            first_page = int(self._branches.base[winner]) // self.page_size
            self._relink(slot, first_page, self._allocate(int(self._num_branch_pages[winner])))
        self._winners[slot] = self._index[winner] if winner >= 0 else MISS
        self._fan_out[slot] = 0

    def close(self, slot: int, rows: np.ndarray) -> None:
        """Free a spine and its branches."""
        self._keep(self.tables[slot, : self.num_pages[slot]])
        self._before_commit(slot)
        self._held_by_branches -= int(self._num_branch_pages[rows].sum())
        self._relink(slot, 0, NO_PAGES)
        self._winners[slot] = CLOSE
        self._fan_out[slot] = 0

    def _before_commit(self, slot: int) -> None:
        """Carry out this slot's operations since its last commit, as they must precede the next one."""
        is_due = self._num_tokens[slot] or self._forks[slot, 0] < self._forks[slot, 1]
        if is_due or any(slot in slots for slots, _, _ in self._adopted):
            self.carry_out()

    def carry_out(self) -> None:
        """Launch all pending operations; `batch` does so before every forward."""
        pool, trees = self.device_pool, self.trees
        committed, reserved = np.flatnonzero(self._winners != SKIP), np.flatnonzero(self._num_tokens)
        forked = np.flatnonzero(self._forks[:, 0] < self._forks[:, 1])
        if len(committed):
            commit(pool, trees, self._to_device(self._winners[committed]), self._slots(committed))
            self._winners[:] = SKIP
        if self._dropped:
            drop(pool, self._kept_pages, self._to_device(np.concatenate(self._dropped)))
            self._dropped.clear()
        if self._adopted:
            adopt(pool, trees, self._kept_pages, *self._to_device(np.concatenate(self._adopted, axis=1)))
            self._adopted.clear()
        if len(reserved):
            reserve(pool, trees, self._to_device(self._num_tokens[reserved]), self._slots(reserved))
            self._num_tokens[:] = 0
        if len(forked):
            self._expand(forked)

    def _expand(self, forked: np.ndarray) -> None:
        trees, to_device = self.trees, self._to_device
        no_drafts = to_device(np.full((len(forked), self._num_drafts), -1, np.int32))
        expand(
            self.device_pool,
            trees,
            to_device(self._lengths[forked]),
            no_drafts,  # the host has already removed them from the candidates
            to_device(self._candidates[forked]),
            to_device(self._fan_out[forked]),
            to_device(self._forks[forked]),
            self._slots(forked),
        )
        self._forks[:] = 0
        for slot in self._filled_base:
            base = int(self._lengths[slot])
            trees.copy_sources[slot, 0] = trees.page_tables[slot, base // self.page_size]
            trees.copy_lens[slot, 0] = base % self.page_size + 1
        self._filled_base.clear()
        if self._copied:
            rows = to_device(np.concatenate(self._copied))
            self._copied.clear()
            sources, num_slots = trees.copy_sources.view(-1)[rows], trees.copy_lens.view(-1)[rows]
            self._model.copy_slots(sources, trees.branch_pages.flatten(0, 1)[rows, 0], num_slots)
            trees.copy_lens.view(-1)[rows] = 0

    def _slots(self, slots: np.ndarray) -> torch.Tensor:
        return self._to_device(slots.astype(np.int32))

    def batch(self, tokens: StepTokens) -> TreeBatch:
        """Carry out all pending operations and build the forward of `tokens`."""
        self.carry_out()
        branches, spines, rows = self._branches, tokens.spines, tokens.token_rows
        to_device, size = self._to_device, self.page_size
        num_spine_tokens = len(tokens.positions) - len(rows)
        slots = np.concatenate(
            [np.repeat([s.slot for s, _ in spines], [n for _, n in spines]), branches.owner[rows]]
        ).astype(np.int64)
        order = np.argsort(slots, kind="stable")  # group tokens by request
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        is_row = np.arange(len(slots)) >= num_spine_tokens
        index, base = np.zeros(len(slots), np.int64), np.zeros(len(slots), np.int64)
        index[is_row], base[is_row] = self._index[rows], branches.base[rows]
        slots, is_row, index, base = slots[order], is_row[order], index[order], base[order]
        positions = tokens.positions[order]
        shared_lens = np.where(is_row, base // size * size, positions + 1)
        own_lens = np.where(is_row, positions + 1 - shared_lens, 0)
        requests, counts = np.unique(slots, return_counts=True)

        request, index, position = to_device(slots), to_device(index), to_device(positions)
        step = to_device(np.where(is_row, positions - base, 0))
        spine_page = self.trees.page_tables[request, position // size].long()
        kv_slots = torch.where(
            to_device(is_row), self.trees.slots[request, index, step], spine_page * size + position % size
        )
        return TreeBatch(
            token_ids=to_device(tokens.token_ids[order]),
            positions=position,
            slots=kv_slots,
            page_tables=self.trees.page_tables[to_device(requests)],
            query_start_loc=to_device(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
            shared_lens=to_device(shared_lens.astype(np.int32)),
            own_pages=self.trees.branch_pages[request, index],
            own_lens=to_device(own_lens.astype(np.int32)),
            max_shared_len=int(shared_lens.max()),
            max_rows=int(counts.max()),
            logit_indices=to_device(place[tokens.logit_indices]),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.tensor(array)  # a copy: the array may change before the device reads it
        device = torch.device(self._model.device)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
