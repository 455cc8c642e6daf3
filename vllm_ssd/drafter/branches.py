"""The branches of all requests, as a struct of arrays for batched steps."""

from __future__ import annotations

import numpy as np

from vllm_ssd.drafter.biases import UNBIASED, Biases
from vllm_ssd.drafter.noise import Unranked
from vllm_ssd.drafter.sampler import Draw
from vllm_ssd.drafter.sequence import Candidates
from vllm_ssd.drafter.truncation import NOTHING
from vllm_ssd.link.protocol import NO_NOISE, SEEDED_NOISE, Noise

JIT_ACCEPT_LENGTH = -1
"""Accept length of the just-in-time branch, whose base is the last committed token, one before the first fork point.
In the protocol its outcome is (0, JIT_TOKEN)."""


class Branches:
    """Up to `per_request` branches for each of `max_num_seqs` requests; row `i` of every array belongs to branch `i`.

    A branch starts at KV position `base` with its first token, a predicted bonus token, followed by up to `num_drafts`
    draft tokens. `Pages` knows where its KV is.

    tokens [capacity, K + 1] int32: first token, then drafts; the first `computed` have been forwarded, and one more has
    been drawn while `computed <= num_drafts`; the first `sent` drafts have been pushed. candidates [capacity, K + 1, C]
    int32, candidate_probs, float32: likeliest bonus tokens after each computed one; draft_probs [capacity, K] float32:
    of each draft (see `Draw`). q_token_ids, q_probs [capacity, K, M]: the proposal of each draft. temperature
    [capacity] float32: 0 for greedy branches. truncation [capacity, 3] float32: see `truncate`. bias [capacity] int32:
    rows of `biases`. noise_kind, noise_seed [capacity] int64: see `protocol.Noise`.

    With a mask_token_id the draft model drafts in parallel: one step forwards the next token of a branch and a mask for
    each further draft, and draws all missing drafts. A mask's KV cannot serve as that of the draft in its place, so
    only the first `num_kept` tokens have valid KV.
    """

    def __init__(
        self,
        max_num_seqs: int,
        per_request: int,
        num_speculative_tokens: int,
        num_candidates: int,
        top_m: int,
        biases: Biases,
        mask_token_id: int | None = None,
    ) -> None:
        k = num_speculative_tokens
        self.max_num_seqs = max_num_seqs
        self.per_request = per_request
        self.num_speculative_tokens = k
        self.num_candidates = num_candidates
        self.biases = biases
        self.mask_token_id = mask_token_id
        capacity = max_num_seqs * per_request
        self.owner = np.zeros(capacity, np.int64)  # slot of the request
        self.accept_length = np.zeros(capacity, np.int64)
        self.base = np.zeros(capacity, np.int64)
        self.computed = np.zeros(capacity, np.int64)
        self.num_kept = np.zeros(capacity, np.int64)
        self.num_drafts = np.zeros(capacity, np.int64)
        self.sent = np.zeros(capacity, np.int64)
        self.alive = np.zeros(capacity, bool)
        self.temperature = np.zeros(capacity, np.float32)
        self.truncation = np.zeros((capacity, 3), np.float32)
        self.bias = np.zeros(capacity, np.int32)
        self.noise_kind = np.zeros(capacity, np.int64)
        self.noise_seed = np.zeros(capacity, np.int64)
        self.tokens = np.zeros((capacity, k + 1), np.int32)
        self.candidates = np.zeros((capacity, k + 1, num_candidates), np.int32)
        self.candidate_probs = np.zeros((capacity, k + 1, num_candidates), np.float32)
        self.draft_probs = np.zeros((capacity, k), np.float32)
        self.q_token_ids = np.zeros((capacity, k, top_m), np.int32)
        self.q_probs = np.zeros((capacity, k, top_m), np.float32)
        self._unranked: Unranked | None = None  # [capacity, K + 1, NUM_UNRANKED], once any request needs it
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Number of branches that can still be added."""
        return len(self._free)

    @property
    def is_parallel(self) -> bool:
        """Whether one step draws all drafts of a branch."""
        return self.mask_token_id is not None

    @property
    def tokens_per_step(self) -> int:
        """Most tokens of one branch in a step."""
        return self.num_speculative_tokens if self.is_parallel else 1

    @property
    def growing(self) -> np.ndarray:
        """Which branches still lack drafts, [capacity] bool."""
        return self.alive & (self.computed < self.num_drafts)

    @property
    def finished(self) -> np.ndarray:
        """Which branches have all drafts but lack the candidates after the last one, [capacity] bool.

        Always false with parallel drafting, where the forward of the spine provides these candidates.
        """
        return self.alive & (self.computed == self.num_drafts) & (not self.is_parallel)

    @property
    def want_steps(self) -> bool:
        """Whether any branch is growing or finished."""
        return bool((self.growing | self.finished).any())

    def steps_left(self, rows: np.ndarray) -> int:
        """Steps until all of `rows` [n] have their drafts."""
        missing = max(int((self.num_drafts[rows] - self.computed[rows]).max()), 0)
        return min(missing, 1) if self.is_parallel else missing

    def due(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens in the next step of `rows` [n], branch by branch: row and place in the branch, both [m] int64."""
        first = self.computed[rows]
        if not self.is_parallel:
            return rows, first
        counts = self.num_drafts[rows] - first
        begins = np.cumsum(counts) - counts
        return np.repeat(rows, counts), np.arange(counts.sum()) + np.repeat(first - begins, counts)

    def add(
        self,
        owner: int,
        accept_length: int,
        base: int,
        num_drafts: int,
        first_tokens: np.ndarray,
        temperature: float,
        truncation: tuple[float, float, float] = NOTHING,
        bias: int = UNBIASED,
        noise: Noise = NO_NOISE,
    ) -> np.ndarray:
        """Add a branch for each of `first_tokens` `[n]`; returns their rows `[n]` int64."""
        rows = np.array([self._free.pop() for _ in first_tokens], np.int64)
        self.owner[rows] = owner
        self.accept_length[rows] = accept_length
        self.base[rows] = base
        self.computed[rows] = 0
        self.num_kept[rows] = 0
        self.sent[rows] = 0
        self.num_drafts[rows] = num_drafts
        self.alive[rows] = True
        self.temperature[rows] = temperature
        self.truncation[rows] = truncation
        self.bias[rows] = bias
        self.noise_kind[rows] = noise.kind
        self.noise_seed[rows] = noise.seed
        self.tokens[rows, 0] = first_tokens
        if self.mask_token_id is not None:
            self.tokens[rows, 1:] = self.mask_token_id
        return rows

    def extend(self, rows: np.ndarray, draw: Draw, first: int = 0) -> None:
        """Store a step's draw for `rows` [n], all growing or all finished; first: index of the first one in `draw`."""
        token_rows, places = self.due(rows)
        self.num_kept[rows] = self.computed[rows] + 1
        self.computed[rows] = self.num_drafts[rows] if self.is_parallel else self.num_kept[rows]
        self._store(token_rows, places, draw, first)

    def begin(self, rows: np.ndarray, draw: Draw, first: int) -> None:
        """Store the draw after the first token of new branches `rows` [n], whose KV exists already."""
        self.num_kept[rows] = self.computed[rows] = 1
        self._store(rows, np.zeros(len(rows), np.int64), draw, first)

    def _store(self, rows: np.ndarray, places: np.ndarray, draw: Draw, first: int) -> None:
        """Store the draw after the tokens at `places` [m] of `rows` [m]."""
        drawn = slice(first, first + len(rows))
        self.candidates[rows, places] = draw.candidates[drawn]
        self.candidate_probs[rows, places] = draw.candidate_probs[drawn]
        if draw.unranked is not None:
            self._keep_unranked(rows, places, *(values[drawn] for values in draw.unranked))
        if not len(rows) or places[0] == self.num_drafts[rows[0]]:
            return
        self.tokens[rows, places + 1] = draw.drawn[drawn]
        self.draft_probs[rows, places] = draw.draft_probs[drawn]
        if draw.q_token_ids is not None and draw.q_probs is not None:
            self.q_token_ids[rows, places] = draw.q_token_ids[drawn]
            self.q_probs[rows, places] = draw.q_probs[drawn]

    def _keep_unranked(self, rows: np.ndarray, places: np.ndarray, token_ids: np.ndarray, scores: np.ndarray) -> None:
        if self._unranked is None:
            shape = *self.candidates.shape[:2], token_ids.shape[1]
            self._unranked = Unranked(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        self._unranked.token_ids[rows, places] = token_ids
        self._unranked.scores[rows, places] = scores

    def candidates_after(self, row: int, place: int) -> Candidates:
        """A copy of what is known of the bonus token after the token at `place` of `row`."""
        has_draft, unranked = place < self.num_drafts[row], None
        if self.noise_kind[row] == SEEDED_NOISE and self._unranked is not None:
            unranked = Unranked(*(values[row, place].copy() for values in self._unranked))
        return Candidates(
            self.candidates[row, place].copy(),
            self.candidate_probs[row, place].copy(),
            int(self.tokens[row, place + 1]) if has_draft else -1,
            float(self.draft_probs[row, place]) if has_draft else 0.0,
            unranked,
        )

    def find(self, rows: np.ndarray, accept_length: int, first_token: int) -> int:
        """The row among `rows` that predicts this outcome, or -1."""
        match = rows[(self.accept_length[rows] == accept_length) & (self.tokens[rows, 0] == first_token)]
        return int(match[0]) if len(match) else -1

    def remove(self, rows: np.ndarray) -> None:
        """Drop `rows`."""
        self.alive[rows] = False
        self._free.extend(rows.tolist())
