"""How many drafts a round should carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_ssd.policy.estimator import RoundEstimator, RoundSums
from vllm_ssd.policy.probing import EVALUATE_ROUNDS, ProbeController

STRAGGLER = 2.0
"""A round this many times slower than expected is dropped, or counts as that slow when the one before was, too."""

CHANGE = 1.3
"""Ratio of duration or tokens, to what was expected, from which the load counts as changed."""
CHANGE_ROUNDS, CHANGE_ROWS = 32, 256
"""Rounds and row-rounds over which that ratio is taken."""
FORGET = 16.0
"""Factor by which everything learned loses weight when the load changed."""


class Adaptation:
    """Number of drafts with the most tokens per second, learned per batch size.

    Batch sizes up to the next power of two share a bucket, which settles on one of the arms `choices` (default: 0 to
    num_speculative_tokens; 0 and num_speculative_tokens must be among them) and now and then probes another: probes
    lose at most 1 % of all rounds and four in advance.
    """

    def __init__(self, num_speculative_tokens: int, choices: Iterable[int] | None = None) -> None:
        self._max_drafts = num_speculative_tokens
        self._choices = set(range(num_speculative_tokens + 1) if choices is None else choices)
        self._buckets: dict[int, Bucket] = {}

    def observe(
        self, batch_size: int, num_drafts: int, offered: Sequence[int], accepted: Sequence[int], seconds: float
    ) -> None:
        """Learn from one round in which every row decoded.

        num_drafts: drafts asked for; offered, accepted [batch_size]: drafts verified and accepted by row; seconds:
        duration.
        """
        self._bucket(batch_size).observe(num_drafts, offered, accepted, seconds)

    def choose(self, batch_size: int) -> int:
        """Number of drafts to ask for in the next round; 0 is plain decoding."""
        return self._bucket(batch_size).probes.choice

    def draft_seconds(self, batch_size: int) -> float:
        """Time in seconds that one more draft in the batch adds to a round; 0 until rounds of two widths were seen."""
        return self._bucket(batch_size).estimator.draft_seconds()

    def _bucket(self, batch_size: int) -> Bucket:
        key = (batch_size - 1).bit_length()
        bucket = self._buckets.get(key)
        if bucket is None:
            near = min(self._buckets, key=lambda other: abs(other - key), default=None)
            start = self._max_drafts if near is None else self._buckets[near].probes.settled
            bucket = self._buckets[key] = Bucket(self._max_drafts, start, self._choices)
        return bucket


class Bucket:
    """Batches of similar size: an estimator, the controller that acts on it, and what keeps bad rounds from both."""

    def __init__(self, max_drafts: int, start: int, choices: Iterable[int]) -> None:
        self.estimator = RoundEstimator(max_drafts)
        self.probes = ProbeController(choices, start, self.estimator.predict)
        self._num_rounds = 0
        self._straggled = False
        self._window = Window()

    def observe(self, num_drafts: int, offered: Sequence[int], accepted: Sequence[int], seconds: float) -> None:
        """Learn from a round and choose the next number of drafts."""
        estimator, probes = self.estimator, self.probes
        self._num_rounds += 1
        expected_s = estimator.round_seconds(len(offered) + sum(offered))
        if expected_s is None:
            expected_s = seconds
        straggled, self._straggled = self._straggled, seconds > STRAGGLER * expected_s
        is_chosen = num_drafts == probes.choice
        if not (is_chosen and probes.skips(seconds)) and (straggled or not self._straggled):
            seconds = min(seconds, STRAGGLER * expected_s)
            rows, tokens = len(offered), len(offered) + sum(accepted)
            if is_chosen and not probes.count(rows, tokens, seconds):
                self._watch(rows, tokens, seconds, expected_s)
            estimator.observe(num_drafts, offered, accepted, seconds)
        if probes.is_probing or self._num_rounds % EVALUATE_ROUNDS == 0:
            estimator.refit()
        settled = probes.settled
        probes.step()
        if probes.settled != settled:
            self._window = Window()

    def _watch(self, rows: int, tokens: int, seconds: float, expected_s: float) -> None:
        """Compare the latest rounds of the settled arm with its estimate; forget most where the load has changed."""
        self._window.add(1.0, rows, tokens, seconds)
        self._window.expected_s += expected_s
        if not self._window.is_full:
            return
        if self._window.differs(self.estimator.tokens_per_row(self.probes.settled)):
            self.estimator.discount(FORGET)
            self.probes.restart()
        self._window = Window()


class Window(RoundSums):
    """The latest rounds of the settled arm, and the duration in seconds that was expected of them."""

    __slots__ = ("expected_s",)

    def __init__(self) -> None:
        super().__init__()
        self.expected_s = 0.0

    @property
    def is_full(self) -> bool:
        """Whether there are enough rounds and row-rounds to compare."""
        return self.rounds >= CHANGE_ROUNDS and self.rows >= CHANGE_ROWS

    def differs(self, tokens_per_row: float | None) -> bool:
        """Whether its rounds differ from expectation: `tokens_per_row`, None when unknown, or in duration."""
        slowdown = self.seconds / self.expected_s
        gain = self.tokens / self.rows / tokens_per_row if tokens_per_row else 1.0
        return not (1 / CHANGE < slowdown < CHANGE and 1 / CHANGE < gain < CHANGE)
