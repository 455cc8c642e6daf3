"""The drafter's state of one request."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vllm_ssd.drafter.biases import UNBIASED
from vllm_ssd.drafter.noise import Unranked
from vllm_ssd.drafter.truncation import NOTHING
from vllm_ssd.link.noise import Replay
from vllm_ssd.link.protocol import NO_NOISE, SEEDED_NOISE, Noise

NO_ROWS = np.empty(0, np.int64)


class Candidates(NamedTuple):
    """The likeliest bonus tokens after a token of the spine.

    token_ids [C] int32, likeliest first; probs [C] float32: see `Draw.candidate_probs`; drawn, draft_prob: the token
    that was drawn there as a draft, and its probability; -1 and 0 if none was; unranked: for `rank_candidates`
    """

    token_ids: np.ndarray
    probs: np.ndarray
    drawn: int = -1
    draft_prob: float = 0.0
    unranked: Unranked | None = None


@dataclass(slots=True)
class Sequence:
    """A request: its spine, and the branches that start from it.

    awaited: number of just-in-time drafts that the target waits for in this round; 0 once it has reported which it
    used, None in rounds without waiting.
    """

    request_id: str
    epoch: int
    slot: int
    temperature: float
    tokens: list[int]
    length: int  # committed tokens; tokens[length:] are the drafts under verification
    computed: int = 0  # leading tokens whose KV is in the pages
    candidates: dict[int, Candidates] = field(default_factory=dict)  # after tokens[i], for i >= length - 1
    rows: np.ndarray = field(default_factory=lambda: NO_ROWS)
    num_forks: int = 0  # fork points whose branches were started
    fan_out: SequenceOf[int] = ()
    levels: tuple[list[int | None], np.ndarray] | None = None  # confidence levels behind `fan_out`, see `_levels`
    num_drafts: int = 0
    after_hit: bool = False
    awaited: int | None = None
    decided_at: float = 0.0  # time of its last outcome
    window_from: float = 0.0  # time of the outcome before the last `num_rounds`; 0 if not usable
    num_rounds: int = 0  # rounds whose outcomes arrived since the last step
    truncation: tuple[float, float, float] = NOTHING  # see `truncation_row`
    bias: int = UNBIASED  # row of `Biases`
    cache_salt: bytes = b""
    noise: Noise = NO_NOISE
    num_published: int = 0  # leading pages in the prefix cache
    _digests: list[bytes] = field(default_factory=list)  # of leading pages

    @property
    def is_computed(self) -> bool:
        """Whether the whole spine has its KV."""
        return self.computed == len(self.tokens)

    def rank_candidates(self, vocab_size: int) -> None:
        """Rank the candidates by the noise of the round, if it is seeded."""
        if self.noise.kind != SEEDED_NOISE:
            return
        replay = Replay(self.noise.seed, self.length, len(self.tokens) - self.length, vocab_size)
        for position, candidates in self.candidates.items():
            if (unranked := candidates.unranked) is not None:
                draw = replay.after_last if position == len(self.tokens) - 1 else replay.after_rejection
                token_ids, probs = unranked.rank(draw(unranked.token_ids), len(candidates.token_ids))
                self.candidates[position] = candidates._replace(token_ids=token_ids, probs=probs)

    def page_digest(self, page: int, page_size: int) -> bytes:
        """Digest of a full page of committed tokens and everything before it, as a chain of hashes.

        Chains with different salts share no digests.
        """
        while len(self._digests) <= page:
            start = len(self._digests) * page_size
            link = hashlib.blake2b(self._digests[-1] if self._digests else self.cache_salt, digest_size=16)
            link.update(array("i", self.tokens[start : start + page_size]).tobytes())
            self._digests.append(link.digest())
        return self._digests[page]
