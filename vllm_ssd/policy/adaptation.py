"""How many drafts a round should carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_ssd.policy.estimator import RoundEstimator, RoundSums
from vllm_ssd.policy.probing import CHANGE, EVALUATE_ROUNDS, ProbeController, differs

STRAGGLER = 2.0
"""A round this many times slower than expected is dropped; if the round before was too, it counts, capped there."""

CHANGE_ROUNDS, CHANGE_ROWS = 32, 256
"""Rounds over which durations, and row-rounds over which tokens, are compared with what was expected, to detect a
change of load. Token counts scatter more, so they need more data."""
FORGET = 64.0
"""Factor by which all earlier observations lose weight when the load has changed."""
MAX_BEHIND = 256
"""Consecutive rounds that are ignored because the drafter is behind. Later ones count: it may never catch up."""


class Adaptation:
    """Number of drafts with the most tokens per second, learned per batch size.

    Batch sizes up to the next power of two share a bucket. A bucket settles on one of the arms, which are numbers of
    drafts, and now and then probes another. Probes may cost at most 1.5 % of all rounds, plus four rounds in advance.

    choices: the arms; default 0 to num_speculative_tokens. Must contain both of these.
    """

    def __init__(self, num_speculative_tokens: int, choices: Iterable[int] | None = None) -> None:
        self._max_drafts = num_speculative_tokens
        self._choices = set(range(num_speculative_tokens + 1) if choices is None else choices)
        self._buckets: dict[int, Bucket] = {}

    def observe(
        self,
        batch_size: int,
        num_drafts: int,
        offered: Sequence[int],
        accepted: Sequence[int],
        seconds: float,
        in_time: bool = True,
    ) -> None:
        """Learn from one round in which every row decoded.

        num_drafts: drafts asked for; offered, accepted [batch_size]: drafts verified and accepted per row; seconds:
        duration; in_time: whether the drafter had caught up with all requests when the round began. Rounds in which it
        was behind (reading prompts, compiling, starting) are ignored.
        """
        self._bucket(batch_size).observe(num_drafts, offered, accepted, seconds, in_time)

    def choose(self, batch_size: int) -> int:
        """Number of drafts to ask for in the next round; 0 is plain decoding."""
        return self._bucket(batch_size).probes.choice

    def draft_seconds(self, batch_size: int) -> float:
        """Seconds that one more draft in the batch adds to a round; 0 until rounds of two widths have been seen."""
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
    """The estimator and probe controller for batches of similar size, with outlier rejection and change detection."""

    def __init__(self, max_drafts: int, start: int, choices: Iterable[int]) -> None:
        self.estimator = RoundEstimator(max_drafts)
        self.probes = ProbeController(choices, start, self.estimator.predict)
        self._num_rounds = self._num_behind = 0
        self._straggled = False
        self._gains = RoundSums()
        # The latest rounds of settled arms: (drafts asked for, offered per row, accepted per row, seconds, expected_s).
        self._recent: list[tuple[int, Sequence[int], Sequence[int], float, float]] = []

    def observe(
        self, num_drafts: int, offered: Sequence[int], accepted: Sequence[int], seconds: float, in_time: bool = True
    ) -> None:
        """Learn from a round and choose the next number of drafts."""
        estimator, probes = self.estimator, self.probes
        is_chosen = num_drafts == probes.choice
        if not in_time and self._num_behind < MAX_BEHIND:
            self._num_behind += 1
            if is_chosen:
                probes.wait(len(offered), len(offered) + sum(accepted), seconds)
            return
        if in_time:
            self._num_behind = 0
        self._num_rounds += 1
        expected_s = estimator.round_seconds(len(offered) + sum(offered))
        if expected_s is None:
            expected_s = seconds
        straggled, self._straggled = self._straggled, seconds > STRAGGLER * expected_s
        if not (is_chosen and probes.skips(seconds)) and (straggled or not self._straggled):
            seconds = min(seconds, STRAGGLER * expected_s)
            rows, tokens = len(offered), len(offered) + sum(accepted)
            if is_chosen:
                if not probes.count(rows, tokens, seconds):
                    self._watch(offered, accepted, seconds, expected_s)
                elif probes.finds_change():
                    estimator.discount(FORGET)
            estimator.observe(num_drafts, offered, accepted, seconds)
        if probes.is_probing or self._num_rounds % EVALUATE_ROUNDS == 0:
            estimator.refit()
        settled = probes.settled
        probes.step()
        if probes.settled != settled:
            self._gains = RoundSums()
            if not probes.settled or not settled:  # the drafter started or stopped slowing the target
                self._recent = []

    def _watch(self, offered: Sequence[int], accepted: Sequence[int], seconds: float, expected_s: float) -> None:
        """Compare the settled arm's latest rounds with its estimate; discount older data if the load has changed."""
        settled, recent = self.probes.settled, self._recent
        recent.append((settled, offered, accepted, seconds, expected_s))
        if len(recent) < CHANGE_ROUNDS:
            return
        self._recent = []
        slowdown = sum(seconds for *_, seconds, _ in recent) / sum(expected_s for *_, expected_s in recent)
        for arm, offered, accepted, seconds, _ in recent:
            if arm == settled:
                self._gains.add(1.0, len(offered), len(offered) + sum(accepted), seconds)
        gain = 1.0
        if self._gains.rows >= CHANGE_ROWS:
            gain = self._gains.tokens / self._gains.rows / (self.estimator.tokens_per_row(settled) or 1.0)
            self._gains = RoundSums()
        if differs(slowdown) or differs(gain):
            self.estimator.discount(FORGET)
            for arm, offered, accepted, seconds, _ in recent:
                self.estimator.observe(arm, offered, accepted, seconds)
            self.probes.restart(slower=slowdown > CHANGE)
