"""The token trees of all requests.

Theory of operation
-------------------
Each request has a *spine*: its committed tokens, the *trunk*, followed by the drafts now under verification. An outcome
(k, t*) accepts k of these drafts and emits the bonus token t* after them. The token that t* follows is *fork point* k.
At each fork point a *branch* starts for each of the likeliest bonus tokens, except the draft that is already there. A
branch is its bonus token and the drafts after it.

    trunk        drafts under verification
    a  b  c      d1     d2     d3
          |      |      |      |
          k = 0  k = 1  k = 2  k = 3       fork points
          x      y      z      w           first tokens of branches, as many as the fan-out says
          ..     ..     ..     ..          their drafts

The target reports an outcome as tokens: those emitted since its last report, then the drafts that it verifies next,
whatever proposed them. Together they form a *path* from the trunk. `advance` walks along it: down the spine as far as
the tokens match, then into the branch that starts at this fork point with the next token, if there is one.

- Hit: the whole path matches. The branch's pages become the spine's, nothing is computed again, and the candidates of
  the next fork points are known from growing the branch.
- Miss: the walk ends before t*, which is forwarded; the next tree forks there.
- Late, trimmed and skipped rounds, n-gram drafts: the same walk, with a shorter match.
- Just in time: the target waits for drafts after a miss. A single branch starts from the last committed token. The
  report that names its drafts emits nothing, and its path is followed from there.
- Parallel drafting: a draft model with a mask token draws all drafts of a branch in one forward, each independently of
  the drafts before it. After a hit only the KV of the bonus token is kept. The forward of the spine overwrites the
  masks' KV with that of the drafts and yields the candidates at their fork points.

All other branches are freed. Uncomputed tokens of the spine are forwarded, and every fork point whose candidates are
known starts its branches; `Stepper` decides which forward comes next.

If pages run out, whole requests are evicted, the least recently advanced first; the target reopens them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf

import numpy as np

from vllm_ssd.drafter.branches import JIT_ACCEPT_LENGTH, Branches
from vllm_ssd.drafter.pages.protocol import Pages
from vllm_ssd.drafter.prediction import MAX_REQUESTS, OutcomePrediction
from vllm_ssd.drafter.pushes import due_rows, take_push
from vllm_ssd.drafter.sampler import Draw
from vllm_ssd.drafter.sequence import NO_ROWS, Sequence
from vllm_ssd.drafter.step_tokens import StepTokens
from vllm_ssd.drafter.stepper import Stepper
from vllm_ssd.drafter.truncation import leaves_tokens, truncation_row
from vllm_ssd.drafter.windows import Windows
from vllm_ssd.link.protocol import ALL_TOKENS, NO_NOISE, DrafterStats, Evicted, Noise, Push, Truncation, common_prefix
from vllm_ssd.policy import BranchBudget, FanOut

PREFILL_TOKENS_PER_STEP = {"cpu": 256, "cuda": 2048}
"""Most prompt tokens per step, so that a long prompt does not delay other requests for long. On a GPU fewer tokens
would take just as long, and branches in the same step do not run from a CUDA graph."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e5
"""Range of temperatures of sampled requests. vLLM treats lower ones as 0; outside, scaled logits overflow or vanish."""


class DraftEngine:
    """Grows the token trees of all open requests, one batched forward at a time.

    `open`, `advance` and `close` only update tokens and pages; `speculate` runs one forward and returns what to push to
    the target. Invalid input from a target is answered with an eviction.
    """

    def __init__(
        self,
        fan_out: FanOut,
        budget: BranchBudget,
        branches: Branches,
        pages: Pages,
        stepper: Stepper,
        *,
        vocab_size: int,
        max_model_len: int,
        prefill_tokens: int = PREFILL_TOKENS_PER_STEP["cpu"],
    ) -> None:
        self._fan_out = fan_out
        self._outcomes = OutcomePrediction(fan_out)
        self._budget = budget
        self._windows = Windows(budget)
        self.branches = branches
        self.pages = pages
        self._stepper = stepper
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._prefill_tokens = prefill_tokens
        self.sequences: dict[str, Sequence] = {}  # least recently advanced first
        self._by_slot: list[Sequence | None] = [None] * branches.max_num_seqs
        self._free_slots = list(range(branches.max_num_seqs - 1, -1, -1))
        self._unfinished: dict[str, Sequence] = {}  # requests whose spine is not fully computed
        self._evicted: list[Evicted] = []
        self._num_branches = branches.per_request - 1  # current number of branches per request
        self.num_evictions = 0  # for lack of pages
        self.num_prompt_tokens = 0  # total over opened requests
        self.num_cached_tokens = 0  # the part of them found in the prefix cache
        self.build_s = 0.0  # latest time from an outcome to the complete next tree
        self._growing_since = 0.0

    def warm_up(self) -> int:
        """Compile and capture everything that serving needs; returns the number of captured batch sizes."""
        return self._stepper.warm_up()

    # ---- the verbs -------------------------------------------------------------------------------------

    def open(
        self,
        request_id: str,
        epoch: int,
        token_ids: np.ndarray,
        temperature: float,
        num_drafts: int,
        truncation: Truncation = ALL_TOKENS,
        cache_salt: bytes = b"",
        noise: Noise = NO_NOISE,
    ) -> None:
        """Start a request from all its committed tokens, `token_ids` `[L]` int32; replaces an earlier epoch."""
        self._stepper.settle()
        known = len(token_ids) and 0 <= token_ids.min() and token_ids.max() < self._vocab_size
        can_draw = temperature == 0 or MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE
        can_draw = can_draw and leaves_tokens(truncation)
        if not known or not can_draw or not self._fits(len(token_ids), num_drafts):
            self.refuse(request_id, epoch)
            return
        self.close(request_id)
        if not self._free_slots:
            oldest = next(iter(self.sequences.values()))
            self.refuse(oldest.request_id, oldest.epoch)
        sequence = Sequence(request_id, epoch, self._free_slots.pop(), temperature, token_ids.tolist(), len(token_ids))
        sequence.truncation = truncation_row(truncation)
        sequence.bias, sequence.cache_salt = self.branches.biases.hold(truncation.bias), cache_salt
        sequence.noise = noise
        self._by_slot[sequence.slot] = sequence
        self._adopt_pages(sequence)
        self.num_prompt_tokens += len(token_ids)
        self.sequences[request_id] = sequence
        self._begin_round(sequence, num_drafts)

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
        rounds: SequenceOf[int] = (),
    ) -> None:
        """Commit `emitted`, take `draft_token_ids` as the drafts now under verification, and start the next tree.

        length: committed length, including `emitted`; rounds: if the outcome covers several rounds, the tokens that
        each of them emitted. A request that is unknown, of another epoch or out of step is reported as evicted, so that
        the target reopens it.
        """
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.epoch != epoch or sequence.length + len(emitted) != length:
            if sequence is None or sequence.epoch <= epoch:
                self.refuse(request_id, epoch)
            return
        path = emitted + draft_token_ids
        known = 0 <= min(path, default=0) and max(path, default=0) < self._vocab_size
        fits = len(draft_token_ids) <= self.branches.num_speculative_tokens
        if not known or not fits or not self._fits(length + len(draft_token_ids), max(num_drafts, jit)):
            self.refuse(request_id, epoch)
            return
        self._stepper.settle()
        if emitted:
            self._observe(sequence, emitted, rounds)
        if jit or emitted:
            sequence.awaited = jit or None
        elif sequence.awaited:
            sequence.awaited = 0  # this report names the just-in-time drafts that were used
        self._follow(sequence, path)
        sequence.length = length
        sequence.candidates = {i: c for i, c in sequence.candidates.items() if i >= length - 1}
        for position in range(length - 1, sequence.computed):
            if position not in sequence.candidates:
                sequence.computed = position
                break
        if jit:  # recompute the last token: its logits are needed, but only its candidates may be stored
            sequence.computed = min(sequence.computed, length - 1)
        self._publish_pages(sequence)
        self.sequences[request_id] = self.sequences.pop(request_id)
        self._begin_round(sequence, num_drafts)

    def refuse(self, request_id: str, epoch: int) -> None:
        """Close a request that cannot be drafted for now, and report it as evicted."""
        self.close(request_id)
        self._evicted.append(Evicted(request_id, epoch))

    def close(self, request_id: str) -> None:
        """Close a request and free its pages; unknown requests are ignored."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is None:
            return
        self._stepper.settle()
        self._unfinished.pop(request_id, None)
        self.branches.remove(sequence.rows)
        self.branches.biases.release(sequence.bias)
        self.pages.close(sequence.slot, sequence.rows)
        self._by_slot[sequence.slot] = None
        self._free_slots.append(sequence.slot)

    @property
    def has_work(self) -> bool:
        """Whether `speculate` would run a forward or has something to report."""
        return bool(self._unfinished or self._evicted or self.branches.want_steps)

    def speculate(self) -> Push | None:
        """Run one forward, if any is wanted, and return what to push to the target."""
        self._windows.learn()
        drawn = self._stepper.step(self._schedule_spines(), self._fan_out_after_hit)
        if drawn is not None:
            self._extend_spines(*drawn)
        return self._report()

    # ---- outcomes --------------------------------------------------------------------------------------

    def _follow(self, sequence: Sequence, path: list[int]) -> None:
        """Replace the spine after the trunk by `path`, keeping the KV of every token on it that is computed."""
        branches, length = self.branches, sequence.length
        k = common_prefix(path, sequence.tokens[length:])
        row = branches.find(sequence.rows, k, path[k]) if k < len(path) else -1
        skipped = 0  # leading tokens of the branch that belong to the trunk
        if row < 0 and k == 0 and path:
            row = branches.find(sequence.rows, JIT_ACCEPT_LENGTH, sequence.tokens[length - 1])
            if row >= 0 and (branches.computed[row] < 1 or branches.tokens[row, 1] != path[0]):
                row = -1
            skipped = 1
        sequence.computed = min(sequence.computed, length + k)
        sequence.after_hit = row >= 0 or (bool(path) and k == len(path))
        if row >= 0:
            base, num_kept = int(branches.base[row]), int(branches.num_kept[row])
            known = branches.tokens[row, skipped : min(branches.computed[row], branches.num_drafts[row]) + 1]
            matched = min(skipped + common_prefix(path[k:], known.tolist()), num_kept)
            sequence.computed = base + matched
            for i in range(skipped, matched):
                sequence.candidates[base + i] = branches.candidates_after(row, i)
        sequence.tokens[length:] = path
        kept = sequence.computed
        sequence.candidates = {i: c for i, c in sequence.candidates.items() if i < kept}
        self.pages.commit(sequence.slot, sequence.rows, row)
        branches.remove(sequence.rows)
        sequence.rows = NO_ROWS

    def _fits(self, num_tokens: int, num_drafts: int) -> bool:
        """Whether a spine of `num_tokens` may have branches of `num_drafts`."""
        most_drafts = self.branches.num_speculative_tokens
        return num_drafts <= most_drafts and num_tokens + num_drafts + 1 < self._max_model_len

    def _observe(self, sequence: Sequence, emitted: list[int], rounds: SequenceOf[int]) -> None:
        """Let the policies learn from an outcome, or from the first of `rounds` if it covers several.

        Tokens that are not the outcome of a single round, accepted drafts and a bonus token, only count as a break.
        """
        now = time.perf_counter()
        self._growing_since = self._growing_since or now
        emitted = emitted[: rounds[0]] if rounds else emitted
        k = common_prefix(emitted, sequence.tokens[sequence.length :])
        is_round = k == len(emitted) - 1
        num_rounds = sum(num_emitted > 0 for num_emitted in rounds) if rounds else 1
        self._windows.outcome(sequence, now, num_rounds if is_round or not emitted else None)
        if not is_round:
            return
        waited = sequence.awaited is not None
        if waited or not sequence.after_hit:
            self._budget.observe_miss(0 if waited else k)
        self._outcomes.observe(sequence, k, emitted[k])

    def _begin_round(self, sequence: Sequence, num_drafts: int) -> None:
        sequence.num_forks = 0
        sequence.num_drafts = num_drafts
        self._rank_candidates(sequence)
        self._num_branches = self._budget.branches(
            num_drafts,
            len(self.sequences),
            self._outcomes.hit_chances(num_drafts),
            self._fan_out.survival(num_drafts, True),
        )
        sequence.fan_out = self._outcomes.counts(sequence, self._num_branches, len(self.sequences))
        if not sequence.is_computed:
            self._unfinished[sequence.request_id] = sequence
        else:
            self._unfinished.pop(sequence.request_id, None)
        self._fork(sequence)

    def _rank_candidates(self, sequence: Sequence) -> None:
        """Rank the candidates by the round's noise, if it is seeded and there are few requests to wait for this."""
        if len(self.sequences) <= MAX_REQUESTS:
            sequence.rank_candidates(self._vocab_size)

    def _fan_out_after_hit(self, num_drafts: int) -> SequenceOf[int]:
        """Branches by accept length in the round after a hit with `num_drafts` drafts."""
        return self._fan_out.counts(num_drafts, True, self._num_branches)

    def _fork(self, sequence: Sequence) -> None:
        """Start the branches of every fork point whose candidates are known."""
        if not sequence.num_drafts or sequence.awaited:
            return
        drafts = sequence.tokens[sequence.length :]
        while sequence.num_forks <= len(drafts):
            k = sequence.num_forks
            candidates = sequence.candidates.get(sequence.length - 1 + k)
            if candidates is None:
                return
            sequence.num_forks += 1
            token_ids = candidates.token_ids
            if k < len(drafts):
                token_ids = token_ids[token_ids != drafts[k]]
            token_ids = self.branches.biases.allowed(sequence.bias, token_ids)
            first_tokens = token_ids[: min(sequence.fan_out[k], self.branches.num_free)]
            if len(first_tokens):
                self._add_branches(sequence, k, sequence.num_drafts, first_tokens)

    def _add_branches(
        self, sequence: Sequence, accept_length: int, num_drafts: int, first_tokens: np.ndarray
    ) -> np.ndarray:
        """Add branches after `accept_length` drafts; returns their rows, none if evicting all others is not enough."""
        base = sequence.length + accept_length
        rows = self.branches.add(
            sequence.slot,
            accept_length,
            base,
            num_drafts,
            first_tokens,
            sequence.temperature,
            sequence.truncation,
            sequence.bias,
            sequence.noise,
        )
        while self.pages.needed(rows) > self.pages.num_free:
            victim = next(iter(self.sequences.values()))
            if victim is sequence:
                self.branches.remove(rows)
                return NO_ROWS
            self._evict(victim)
        self.pages.fork(rows)
        sequence.rows = np.concatenate([sequence.rows, rows])
        return rows

    # ---- spines ----------------------------------------------------------------------------------------

    def _adopt_pages(self, sequence: Sequence) -> None:
        """Adopt cached full pages of the prompt, leaving at least its last token to compute."""
        size = self.pages.page_size
        first, end = sequence.computed // size, (sequence.length - 1) // size
        if first >= end or sequence.computed % size or not self.pages.missing(sequence.slot, sequence.computed + 1):
            return
        num_pages = self.pages.adopt(sequence.slot, (sequence.page_digest(i, size) for i in range(first, end)))
        sequence.computed += num_pages * size
        sequence.num_published += num_pages
        self.num_cached_tokens += num_pages * size

    def _publish_pages(self, sequence: Sequence) -> None:
        """Publish the trunk's full pages before its last token, which will not be computed again."""
        size = self.pages.page_size
        first, end = sequence.num_published, min(sequence.computed, sequence.length - 1) // size
        if first < end:
            self.pages.publish(sequence.slot, first, [sequence.page_digest(i, size) for i in range(first, end)])
            sequence.num_published = end

    def _schedule_spines(self) -> list[tuple[Sequence, int]]:
        """Choose unfinished spines and their number of tokens for the next step, and reserve the pages for them."""
        budget, spines = self._prefill_tokens, []
        for sequence in list(self._unfinished.values()):
            if not budget:
                break
            if not self._is_open(sequence):
                continue  # evicted for a spine earlier in this loop
            self._adopt_pages(sequence)
            num_tokens = self._chunk(sequence, budget, alone=not spines)
            if num_tokens and self._reserve(sequence, sequence.computed + num_tokens):
                budget -= num_tokens
                spines.append((sequence, num_tokens))
        return [(sequence, n) for sequence, n in spines if self._is_open(sequence)]

    def _chunk(self, sequence: Sequence, budget: int, *, alone: bool) -> int:
        """Number of a spine's tokens for the next step: all, or up to a page's end, where cached pages may follow."""
        num_left = len(sequence.tokens) - sequence.computed
        if num_left <= budget:
            return num_left
        to_page_end = budget - (sequence.computed + budget) % self.pages.page_size
        return to_page_end if to_page_end > 0 else budget if alone else 0

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the spine pages for `num_tokens`, evicting the least recently advanced requests if needed."""
        while self.pages.missing(sequence.slot, num_tokens) > self.pages.num_free:
            victim = next(iter(self.sequences.values()))
            self._evict(victim)
            if victim is sequence:
                return False
        self.pages.reserve(sequence.slot, num_tokens)
        return True

    def _evict(self, sequence: Sequence) -> None:
        """Evict a request for lack of pages."""
        self.refuse(sequence.request_id, sequence.epoch)
        self.num_evictions += 1

    def _is_open(self, sequence: Sequence) -> bool:
        """Whether the request is still open and not evicted."""
        return self.sequences.get(sequence.request_id) is sequence

    def _extend_spines(self, tokens: StepTokens, draw: Draw) -> None:
        """Store the spines' candidates, advance their computed lengths, and start the branches this allows."""
        for i, (sequence, position) in enumerate(tokens.spine_logits):
            sequence.candidates[position] = draw.candidates_of(i)
        for sequence, n in tokens.spines:
            if not self._is_open(sequence):
                continue  # evicted for the branches of a spine earlier in this loop
            sequence.computed += n
            self._publish_pages(sequence)
            if sequence.is_computed:
                del self._unfinished[sequence.request_id]
            self._rank_candidates(sequence)
            self._fork(sequence)
        for i, (sequence, position) in enumerate(tokens.spine_logits):
            if self._is_open(sequence) and sequence.awaited and position == sequence.length - 1:
                self._start_jit(sequence, sequence.awaited, draw, i)

    def _start_jit(self, sequence: Sequence, num_drafts: int, draw: Draw, i: int) -> None:
        """Start the just-in-time branch, whose first draft is the token just drawn after the trunk."""
        last_token = np.array(sequence.tokens[sequence.length - 1 : sequence.length])
        rows = self._add_branches(sequence, JIT_ACCEPT_LENGTH, num_drafts, last_token)
        if len(rows):
            self.branches.begin(rows, draw, i)

    # ---- pushes ----------------------------------------------------------------------------------------

    def _report(self) -> Push | None:
        """Collect the new drafts and evictions that are due; None if there are none."""
        branches = self.branches
        if self._growing_since and not (self._unfinished or branches.growing.any()):
            self.build_s = time.perf_counter() - self._growing_since
            self._growing_since = 0.0
        rows = due_rows(branches, self._by_slot, self._budget)
        evicted, self._evicted = self._evicted, []
        return take_push(branches, self._by_slot, rows, evicted) if len(rows) or evicted else None

    @property
    def num_steps(self) -> int:
        """Number of forwards so far."""
        return self._stepper.num_steps

    def stats(self) -> DrafterStats:
        """Counters and page use for the target's metrics."""
        return DrafterStats(
            self.pages.num_free,
            self.pages.capacity,
            self.build_s * 1e3,
            self.num_steps,
            self.num_evictions,
            self.num_prompt_tokens,
            self.num_cached_tokens,
        )
