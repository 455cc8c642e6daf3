"""The token trees of all requests, and the batched forwards that grow them.

Each request has a *spine*: its committed tokens (the trunk) followed by the drafts now under verification.
At every point of the spine where an outcome can fall, *branches* start, one for each likely bonus token.
An outcome names tokens; following them along the spine and into a branch finds all the KV that is already
there: a branch that was hit becomes the spine by relinking its pages, everything else is released.
"""

from __future__ import annotations

import time

import numpy as np

from vllm_ssd.compat.drafter.paged import PagedModel
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.device_steps import MAX_TOP_M, DeviceSteps, Run
from vllm_ssd.drafter.forward import Draw, Sampler, step_tokens
from vllm_ssd.drafter.pages.device import DevicePages
from vllm_ssd.drafter.pages.host import HostPages
from vllm_ssd.drafter.pushes import JUST_IN_TIME, due_rows, take_blocks
from vllm_ssd.drafter.sequence import NO_ROWS, Sequence
from vllm_ssd.link.protocol import DrafterStats, Evicted, Push, common_prefix
from vllm_ssd.policy import BranchBudget, FanOut

PREFILL_TOKENS_PER_STEP = 256
"""Prompt tokens forwarded beside one step of the branches, so that a long prompt delays nobody for long."""


class DraftEngine:
    """Grow the speculation of every open request, one batched forward at a time.

    `open`, `advance` and `close` only move tokens and pages; `speculate` runs one forward and returns what
    the target should hear of it.
    """

    def __init__(
        self,
        model: PagedModel,
        fan_out: FanOut,
        *,
        num_speculative_tokens: int,
        max_num_seqs: int,
        max_branches: int,
        max_fan_out: int,
        top_m: int,
        seed: int,
        saguaro_c: float = 1.0,
        pages: type[HostPages] | type[DevicePages] = HostPages,
    ) -> None:
        self._model = model
        self._fan_out = fan_out
        self._budget = BranchBudget(max_num_seqs * max_branches)
        self._page_size = model.page_size
        num_candidates = min(max_fan_out + 1, model.vocab_size)  # one may be the drafted token
        top_m = min(top_m, model.vocab_size)
        if pages is DevicePages:
            top_m = max(top_m, num_candidates)  # there both come from one list
        self._saguaro_c = saguaro_c
        self._sampler = Sampler(num_candidates, top_m, seed, saguaro_c)
        capacity = max_num_seqs * (max_branches + 1)
        self.branches = Branches(capacity, num_speculative_tokens, num_candidates, top_m)
        self.pages = pages(model, max_num_seqs, max_branches, num_speculative_tokens, num_candidates)
        self._steps: DeviceSteps | None = None
        self._run: Run | None = None  # under way; every verb that changes its branches takes what it launched first
        self._step_began = 0.0
        if isinstance(self.pages, DevicePages) and top_m <= MAX_TOP_M:
            self._steps = DeviceSteps(model, self.pages, num_candidates, top_m, seed, saguaro_c)
        self.sequences: dict[str, Sequence] = {}  # least recently advanced first
        self._by_slot: list[Sequence | None] = [None] * max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._unfinished: dict[str, Sequence] = {}  # spine not wholly computed
        self._evicted: list[Evicted] = []
        self._temperatures = np.zeros(max_num_seqs, np.float32)
        self._num_branches = max_branches  # a request grows now
        self.num_steps = 0
        self.num_evictions = 0
        self.build_s = 0.0  # from an outcome to the whole tree after it, last seen
        self._growing_since = 0.0

    # ---- the verbs -------------------------------------------------------------------------------------

    def open(self, request_id: str, epoch: int, token_ids: np.ndarray, temperature: float, num_drafts: int) -> None:
        """Start a request from all its committed tokens, `token_ids` `[L]` int32; replaces an earlier epoch."""
        self._settle()
        self.close(request_id)
        if len(token_ids) + num_drafts + 1 >= self._model.max_model_len or not len(token_ids):
            self._evicted.append(Evicted(request_id, epoch))
            return
        if not self._free_slots:
            self._evict(next(iter(self.sequences.values())))
        sequence = Sequence(request_id, epoch, self._free_slots.pop(), temperature, token_ids.tolist(), len(token_ids))
        self._by_slot[sequence.slot] = sequence
        self._temperatures[sequence.slot] = temperature
        self._share_prefix(sequence)
        self.sequences[request_id] = sequence
        self._begin_round(sequence, num_drafts, jit=0)

    def advance(
        self,
        request_id: str,
        epoch: int,
        length: int,
        emitted: list[int],
        draft_token_ids: list[int],
        *,
        num_drafts: int,
        jit: int = 0,
    ) -> None:
        """Commit `emitted`, take `draft_token_ids` as the drafts now under verification, start the next tree.

        `length` is the committed length after `emitted`. A request that is unknown, of another epoch or out of
        step is reported as evicted: the target then opens it anew.
        """
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.epoch != epoch or sequence.length + len(emitted) != length:
            if sequence is None or sequence.epoch <= epoch:
                self.close(request_id)
                self._evicted.append(Evicted(request_id, epoch))
            return
        self._settle()
        path = emitted + draft_token_ids
        if length + len(draft_token_ids) + num_drafts + 1 >= self._model.max_model_len:
            self._evict(sequence)
            return
        if emitted:
            now = time.perf_counter()
            self._growing_since = self._growing_since or now
            if sequence.decided_at:
                self._budget.observe_window(now - sequence.decided_at)
            sequence.decided_at = now
        self._observe(sequence, emitted)
        sequence.waited = bool(jit) or (sequence.waited and not emitted)
        self._follow(sequence, path)
        sequence.length = length
        sequence.candidates = {i: c for i, c in sequence.candidates.items() if i >= length - 1}
        for position in range(length - 1, sequence.computed):
            if position not in sequence.candidates:
                sequence.computed = position
                break
        self.sequences[request_id] = self.sequences.pop(request_id)
        self._begin_round(sequence, num_drafts, jit)

    def close(self, request_id: str) -> None:
        """Forget a request and free its pages; unknown requests are fine."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is None:
            return
        self._settle()
        self._unfinished.pop(request_id, None)
        self.branches.remove(sequence.rows)
        self.pages.close(sequence.slot, sequence.rows)
        self._by_slot[sequence.slot] = None
        self._free_slots.append(sequence.slot)

    @property
    def has_work(self) -> bool:
        """Whether `speculate` would run a forward or has something to report."""
        return bool(self._unfinished or self._evicted or self.branches.growing.any() or self.branches.finished.any())

    def speculate(self) -> Push | None:
        """One forward: uncomputed spines, and the next token of every branch that wants one.

        With pages on the device, steps of branches alone are launched ahead: this takes what the next one drew.
        Only when nothing else is wanted are finished branches run once more, over their last draft: then all
        fork points of the next round are known before its outcome is.
        """
        if self._run is not None:
            return self._take_step(self._run)
        branches, started = self.branches, time.perf_counter()
        spines = self._schedule_spines()
        growing, finished = branches.growing, branches.finished
        rows = np.flatnonzero(growing if growing.any() or spines else finished)
        if not len(rows) and not spines:
            return self._report()
        if self._steps is not None and not spines:
            return self._take_step(self._start_run(self._steps, rows, alone=not (growing.any() and finished.any())))
        tokens = step_tokens(branches, spines, rows)
        spine_logits = tokens.spine_logits
        batch = self.pages.batch(branches, spines, rows, tokens)
        temperatures = np.array([s.temperature for s, _ in spine_logits], np.float32)
        temperatures = np.concatenate([temperatures, self._temperatures[branches.owner[rows]]])
        down_weighted = self._saguaro_c < 1 and temperatures.any()
        fan_out = self._prepared(rows, len(spine_logits)) if down_weighted else None
        draw = self._sampler.draw(self._model.forward(batch), temperatures, fan_out)
        self.num_steps += 1
        branches.extend(rows, draw, len(spine_logits))
        self._extend_spines(spines, spine_logits, draw)
        if not spines:
            self._budget.observe_step(len(rows), time.perf_counter() - started)
        return self._report()

    # ---- outcomes --------------------------------------------------------------------------------------

    def _follow(self, sequence: Sequence, path: list[int]) -> None:
        """Make `path` the spine after the trunk, keeping the KV of every token already computed on it."""
        branches, length = self.branches, sequence.length
        k = common_prefix(path, sequence.tokens[length:])
        row = -1
        if k < len(path):
            row = branches.find(sequence.rows, k, path[k])
        first = length + k
        offset = 0
        if row < 0 and k == 0 and path:
            row = branches.find(sequence.rows, JUST_IN_TIME, sequence.tokens[length - 1])
            if row >= 0 and (branches.computed[row] < 1 or branches.tokens[row, 1] != path[0]):
                row = -1
            first, offset = length - 1, 1
        sequence.computed = min(sequence.computed, length + k)
        sequence.after_hit = row >= 0 or (bool(path) and k == len(path))
        if row >= 0:
            known = branches.tokens[row, offset : min(branches.computed[row], branches.num_drafts[row]) + 1]
            matched = offset + common_prefix(path[k:], known.tolist())
            matched = min(matched, int(branches.computed[row]))
            sequence.computed = first + matched
            for i in range(offset, matched):
                sequence.candidates[first + i] = branches.candidates[row, i].copy()
        sequence.tokens[length:] = path
        kept = sequence.computed
        sequence.candidates = {i: c for i, c in sequence.candidates.items() if i < kept}
        self.pages.commit(sequence.slot, sequence.rows, row, first)
        branches.remove(sequence.rows)
        sequence.rows = NO_ROWS

    def _observe(self, sequence: Sequence, emitted: list[int]) -> None:
        """Tell the policies where the outcome fell, when it was that of one round."""
        drafts = sequence.tokens[sequence.length :]
        k = common_prefix(emitted, drafts)
        if k != len(emitted) - 1:
            return
        if sequence.waited or not sequence.after_hit:
            self._budget.observe_miss(0 if sequence.waited else k)
        candidates = sequence.candidates.get(sequence.length - 1 + k)
        if candidates is None:
            return
        others = [t for t in candidates.tolist() if k == len(drafts) or t != drafts[k]]
        rank = others.index(emitted[k]) if emitted[k] in others else None
        self._fan_out.observe(len(drafts), k, rank, sequence.after_hit, len(others))

    def _begin_round(self, sequence: Sequence, num_drafts: int, jit: int) -> None:
        sequence.num_forks = 0
        sequence.num_drafts = num_drafts
        sequence.jit = jit
        num_named = len(sequence.tokens) - sequence.length
        self._num_branches = self._budget.branches(
            num_drafts,
            len(self.sequences),
            self._fan_out.hit_chances(num_drafts, True),
            self._fan_out.survival(num_drafts, True),
        )
        sequence.fan_out = self._fan_out.counts(num_named, sequence.after_hit, self._num_branches)
        if not sequence.is_computed:
            self._unfinished[sequence.request_id] = sequence
        else:
            self._unfinished.pop(sequence.request_id, None)
        self._fork(sequence)

    def _fork(self, sequence: Sequence) -> None:
        """Start the branches of every fork point whose candidates are known."""
        if not sequence.num_drafts or sequence.jit:
            return
        length, drafts = sequence.length, sequence.tokens[sequence.length :]
        while sequence.num_forks <= len(drafts):
            k = sequence.num_forks
            candidates = sequence.candidates.get(length - 1 + k)
            if candidates is None:
                return
            sequence.num_forks += 1
            if k < len(drafts):
                candidates = candidates[candidates != drafts[k]]
            first_tokens = candidates[: min(sequence.fan_out[k], self.branches.num_free)]
            if len(first_tokens):
                self._add_branches(sequence, k, length + k, sequence.num_drafts, first_tokens, length + k)

    def _add_branches(
        self, sequence: Sequence, accept_length: int, base: int, num_drafts: int, first_tokens: np.ndarray, filled: int
    ) -> np.ndarray:
        """Branches from `base`, with the slots below `filled` of its page copied from the spine."""
        while len(first_tokens) * self.pages.per_branch(base, num_drafts) > self.pages.num_free:
            victim = next(iter(self.sequences.values()))
            if victim is sequence:
                return NO_ROWS
            self._evict(victim)
        rows = self.branches.add(sequence.slot, accept_length, base, num_drafts, first_tokens)
        self.pages.fork(sequence.slot, rows, accept_length, base, num_drafts, first_tokens, filled)
        sequence.rows = np.concatenate([sequence.rows, rows])
        return rows

    # ---- pages -----------------------------------------------------------------------------------------

    def _share_prefix(self, sequence: Sequence) -> None:
        """Read full pages of a prompt that another request has already computed (`n > 1`, shared prefixes)."""
        best, best_pages = None, 0
        for other in self.sequences.values():
            usable = min(other.computed, other.length, sequence.length - 1)
            if usable // self._page_size > best_pages:
                pages = common_prefix(sequence.tokens[:usable], other.tokens[:usable]) // self._page_size
                if pages > best_pages:
                    best, best_pages = other, pages
        if best is not None:
            self.pages.share(sequence.slot, best.slot, best_pages)
            sequence.computed = best_pages * self._page_size

    def _grow_table(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the spine pages for `num_tokens`, evicting the least recently advanced requests if needed."""
        while self.pages.missing(sequence.slot, num_tokens) > self.pages.num_free:
            victim = next(iter(self.sequences.values()))
            self._evict(victim)
            if victim is sequence:
                return False
        self.pages.reserve(sequence.slot, num_tokens)
        return True

    def _evict(self, sequence: Sequence) -> None:
        self.close(sequence.request_id)
        self._evicted.append(Evicted(sequence.request_id, sequence.epoch))
        self.num_evictions += 1

    # ---- one forward -----------------------------------------------------------------------------------

    def _schedule_spines(self) -> list[tuple[Sequence, int]]:
        """Uncomputed spines and how many of their tokens ride in this step."""
        budget, spines = PREFILL_TOKENS_PER_STEP, []
        for sequence in list(self._unfinished.values()):
            num_tokens = min(len(sequence.tokens) - sequence.computed, budget)
            if not num_tokens:
                break
            if sequence.request_id not in self.sequences or not self._grow_table(
                sequence, sequence.computed + num_tokens
            ):
                continue
            budget -= num_tokens
            spines.append((sequence, num_tokens))
        return [(s, n) for s, n in spines if self.sequences.get(s.request_id) is s]

    def _prepared(self, rows: np.ndarray, num_spine_logits: int, ahead: int = 0) -> np.ndarray:
        """Bonus tokens that will be predicted where the token drawn after each logits row is rejected, `[n]`.

        The token is the one drawn now, or so many steps ahead.
        """
        branches = self.branches
        prepared = np.zeros(len(rows), np.int64)
        for k in set(branches.num_drafts[rows].tolist()):
            of_k = branches.num_drafts[rows] == k
            counts = np.array(self._fan_out.counts(k, True, self._num_branches))
            prepared[of_k] = counts[branches.computed[rows[of_k]] + ahead]
        return np.concatenate([np.zeros(num_spine_logits, np.int64), prepared])

    def _start_run(self, steps: DeviceSteps, rows: np.ndarray, alone: bool) -> Run:
        """The steps that no branch in `rows` is done before; the last one too, if they finish at once and are alone."""
        branches = self.branches
        missing = branches.num_drafts[rows] - branches.computed[rows]
        num_steps = max(int(missing.min()), 1)
        if alone and (missing == num_steps).all():
            num_steps += 1
        temperatures = self._temperatures[branches.owner[rows]]
        fan_out = np.zeros((num_steps, len(rows)), np.int64)
        if self._saguaro_c < 1 and temperatures.any():
            fan_out = np.stack([self._prepared(rows, 0, step) for step in range(num_steps)])
        self._step_began = time.perf_counter()
        self._run = steps.start(branches, rows, temperatures, fan_out)
        return self._run

    def _take_step(self, run: Run) -> Push | None:
        """Store what the next step of `run` drew, and report it."""
        self.branches.extend(run.rows, run.take())
        self.num_steps += 1
        now = time.perf_counter()
        self._budget.observe_step(len(run.rows), now - self._step_began)
        self._step_began = now
        if run.is_done:
            self._run = None
        return self._report()

    def _settle(self) -> None:
        """End the run under way with the steps that it has launched, whose draws and KV are as good as any."""
        run, self._run = self._run, None
        if run is not None:
            run.stop()
            while not run.is_done:
                self.branches.extend(run.rows, run.take())
                self.num_steps += 1

    def _extend_spines(
        self, spines: list[tuple[Sequence, int]], spine_logits: list[tuple[Sequence, int]], draw: Draw
    ) -> None:
        """Count what was computed of `spines`, and start the branches that this allows."""
        for i, (sequence, position) in enumerate(spine_logits):
            sequence.candidates[position] = draw.candidates[i]
        for sequence, n in spines:
            if self.sequences.get(sequence.request_id) is not sequence:
                continue  # evicted just now, for the branches of one before it
            sequence.computed += n
            if sequence.is_computed:
                del self._unfinished[sequence.request_id]
            self._fork(sequence)
        for i, (sequence, position) in enumerate(spine_logits):
            alive = self.sequences.get(sequence.request_id) is sequence
            if alive and sequence.jit and position == sequence.length - 1:
                self._start_jit(sequence, draw, i)

    def _start_jit(self, sequence: Sequence, draw: Draw, i: int) -> None:
        """One branch for the very round that waits, from the token just drawn after the trunk."""
        base = sequence.length - 1
        rows = self._add_branches(
            sequence, JUST_IN_TIME, base, sequence.jit, np.array([sequence.tokens[base]]), sequence.length
        )
        if len(rows):
            self.branches.extend(rows, draw, i)

    # ---- news ------------------------------------------------------------------------------------------

    def _report(self) -> Push | None:
        """What the target should hear now."""
        branches = self.branches
        if self._growing_since and not (self._unfinished or branches.growing.any()):
            self.build_s = time.perf_counter() - self._growing_since
            self._growing_since = 0.0
        blocks = take_blocks(branches, self._by_slot, due_rows(branches, self._by_slot, self._budget))
        evicted, self._evicted = self._evicted, []
        return Push(blocks, evicted, None) if blocks or evicted else None

    def stats(self) -> DrafterStats:
        """Counters and page use for the target's metrics."""
        return DrafterStats(
            self.pages.num_free, self._model.num_pages, self.build_s * 1e3, self.num_steps, self.num_evictions
        )
