"""Where a simulated request's accept lengths and ranks of the bonus token come from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_ssd.planning.profile import Acceptance, Round
from vllm_ssd.policy import MAX_LEARNED_FAN_OUT


class Outcomes(Protocol):
    """Where accept lengths and ranks of the bonus token come from."""

    def draw(self, num_drafts: int, after_hit: bool) -> tuple[int, int | None]:
        """Accept length and rank of t* (None: beyond the candidates) of the next round of one request."""


class Synthetic:
    """Independent rounds with the chances of an `Acceptance`."""

    def __init__(self, acceptance: Acceptance, seed: int = 0) -> None:
        self._acceptance, self._random = acceptance, random.Random(seed)

    def draw(self, num_drafts: int, after_hit: bool) -> tuple[int, int | None]:
        """See `Outcomes.draw`."""
        chances = self._acceptance.after_hit if after_hit else self._acceptance.after_miss
        k = 0
        while k < num_drafts and self._random.random() < chances[min(k, len(chances) - 1)]:
            k += 1
        draw = self._random.random()
        ranks = (f for f in range(MAX_LEARNED_FAN_OUT) if draw < self._acceptance.covered(num_drafts, k, f + 1))
        return k, next(ranks, None)


class Recorded:
    """Rounds of a trace in their order, from a random place on, again and again.

    A round that carries fewer drafts than the recorded one is cut short: a longer recorded acceptance becomes full
    acceptance, whose rank is then that of the next recorded round of full acceptance.
    """

    def __init__(self, rounds: Sequence[Round], seed: int = 0) -> None:
        self._rounds = list(rounds)
        if not any(m and k == m for m, k, _, _ in self._rounds):
            raise ValueError("the trace has no round that accepted all of its drafts")
        self._next = random.Random(seed).randrange(len(self._rounds))

    def draw(self, num_drafts: int, after_hit: bool) -> tuple[int, int | None]:
        """See `Outcomes.draw`; a round without drafts takes the next recorded one without, if there is any."""
        recorded = self._advance(lambda r: (r[0] > 0) == (num_drafts > 0)) or self._advance(lambda r: True)
        m, k, rank, _ = recorded
        if k < min(m, num_drafts) or m == num_drafts == k:
            return k, rank
        full = self._advance(lambda r: r[0] > 0 and r[0] == r[1])
        return min(num_drafts, k), full[2]

    def _advance(self, wanted: Callable[[Round], bool]) -> Round | None:
        for _ in range(len(self._rounds)):
            found = self._rounds[self._next]
            self._next = (self._next + 1) % len(self._rounds)
            if wanted(found):
                return found
        return None
