"""Sources of simulated outcomes: accept lengths and ranks of the bonus token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_ssd.planning.profile import Acceptance, Round
from vllm_ssd.policy import MAX_LEARNED_FAN_OUT


class Outcomes(Protocol):
    """Source of one request's outcomes."""

    def draw(self, num_drafts: int, after_hit: bool) -> tuple[int, int | None]:
        """Accept length of the request's next round, and rank of the bonus token t* (None if it is no candidate)."""
        ...


class Synthetic:
    """Outcomes drawn independently from an `Acceptance`."""

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
    """Outcomes of a recorded trace, replayed in a loop from a random round on.

    If the recorded accept length is at least the number of drafts of the simulated round, that round accepts them all,
    with the rank of the next recorded round that accepted all of its drafts. If a recorded round accepted all of its
    drafts, but had fewer, the next one decides about the others.
    """

    def __init__(self, rounds: Sequence[Round], seed: int = 0) -> None:
        self._rounds = list(rounds)
        if not any(m and k == m for m, k, _, _ in self._rounds):
            raise ValueError("the trace has no round that accepted all of its drafts")
        self._next = random.Random(seed).randrange(len(self._rounds))

    def draw(self, num_drafts: int, after_hit: bool) -> tuple[int, int | None]:
        """See `Outcomes.draw`; rounds without drafts use recorded rounds without drafts, if there are any."""
        m, k, rank, _ = self._advance(lambda r: (r[0] > 0) == (num_drafts > 0))
        if k < min(m, num_drafts) or m == num_drafts == k:
            return k, rank
        if 0 < m < num_drafts:
            further, rank = self.draw(num_drafts - m, after_hit)
            return m + further, rank
        full = self._advance(lambda r: r[0] > 0 and r[0] == r[1])
        return min(num_drafts, k), full[2]

    def _advance(self, matches: Callable[[Round], bool]) -> Round:
        """The next round that matches; if none does, the next round."""
        order = range(self._next, self._next + len(self._rounds))
        at = next((i for i in order if matches(self._rounds[i % len(self._rounds)])), self._next)
        self._next = (at + 1) % len(self._rounds)
        return self._rounds[at % len(self._rounds)]
