"""How many drafts a round should carry."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MEMORY_ROUNDS = 256
"""Rounds after which an observation's weight has fallen to 1 / e."""
EVALUATE_ROUNDS = 8
SPECULATION_COST = 0.03
"""Relative rate that speculation must gain over plain decoding: rounds with prompts, which are not seen, pay too."""
KNOWN_ROUNDS = 2.0
"""Decayed rounds an arm needs to be switched to without a probe."""
STALE_ROUNDS = 0.5
"""Decayed rounds below which even an arm that promises little is probed again: it may have been unlucky."""
FORGOTTEN_ROUNDS = 1e-6
"""Decayed rounds at which an arm counts as never measured."""
PRIOR_ACCEPTANCE, PRIOR_TRIES = 0.5, 4.0
"""Chance that a first draft is accepted. A later one does like the one before it, until it was tried more often."""
PRIOR_CARRIED = 64.0
"""Row-rounds that the drafts carried under other arms weigh against those under an arm itself."""
PRIOR_ROWS = 512.0
"""Row-rounds that all this weighs against what an arm's own rows accepted."""
STRAGGLER = 2.0
"""A round that took this many times what was expected is dropped, or counts as that when the one before did too."""
CHANGE, CHANGE_ROUNDS, CHANGE_ROWS, FORGET = 1.3, 32, 256, 16.0
"""Durations or tokens this far off for so many rounds and row-rounds are a changed environment: older rounds lose that
much weight."""
PROBE_ROUNDS, PROBE_ROUNDS_OFF, MAX_PROBE_ROUNDS = 4, 8, 64
"""Rounds of a probe during speculation, during plain decoding (the drafter has to catch up), and while it does well."""
MIN_PROBE_GAP, MAX_PROBE_GAP = 16, 256
PROBE_LOSS, MAX_PROBE_CREDIT = 0.01, 4.0
"""Share of all time that probes may lose; rounds that they may lose in advance, at the start and after a change."""
OPTIMISM = 0.15
"""Relative rate credited to an arm that was never measured when a probe is chosen."""


def draft_grid(most: int) -> list[int]:
    """Numbers of drafts that stand for all from 0 to `most` >= 1: 0, 1, 2, 4, … and `most`."""
    return sorted({0, *(1 << i for i in range(most.bit_length())), most})


class Adaptation:
    """Number of drafts with the most tokens per second, learned per batch size.

    Batch sizes share a bucket up to the next power of two. A bucket's arms are `choices`, among them 0 and
    num_speculative_tokens, by default every number from one to the other: it predicts a row's tokens and a round's
    seconds for each, uses the best, and probes another for a few rounds as long as probes lose at most 1 % of the time
    and four rounds.
    """

    def __init__(self, num_speculative_tokens: int, choices: Iterable[int] | None = None) -> None:
        self._max_drafts = num_speculative_tokens
        self._choices = set(range(num_speculative_tokens + 1) if choices is None else choices)
        self._buckets: dict[int, Bucket] = {}

    def observe(
        self, batch_size: int, wanted: int, offered: Sequence[int], accepted: Sequence[int], seconds: float
    ) -> None:
        """Learn from one round in which every row decoded.

        wanted: the drafts asked for; offered, accepted [batch_size]: drafts verified and accepted; seconds: duration.
        """
        self._bucket(batch_size).observe(wanted, offered, accepted, seconds)

    def choose(self, batch_size: int) -> int:
        """Number of drafts for the next round; 0 is plain decoding."""
        return self._bucket(batch_size).choice

    def draft_seconds(self, batch_size: int) -> float:
        """Time that one more draft in the batch adds to a round, as far as rounds of different width were seen."""
        return self._bucket(batch_size).draft_seconds()

    def _bucket(self, batch_size: int) -> Bucket:
        key = (batch_size - 1).bit_length()
        bucket = self._buckets.get(key)
        if bucket is None:
            near = min(self._buckets, key=lambda other: abs(other - key), default=None)
            start = self._max_drafts if near is None else self._buckets[near].settled
            bucket = self._buckets[key] = Bucket(self._max_drafts, start, self._choices)
        return bucket


@dataclass(slots=True)
class Sums:
    """Weighted sums over rounds."""

    rounds: float = 0.0
    rows: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, weight: float, rows: int, tokens: int, seconds: float) -> None:
        self.rounds += weight
        self.rows += weight * rows
        self.tokens += weight * tokens
        self.seconds += weight * seconds


class Arm(Sums):
    """Sums over rounds that wanted the same number of drafts.

    carried[j], accepted[j]: rows that carried, and that accepted, more than j drafts; rejected[j]: rows that rejected
    the draft after j accepted ones.
    """

    __slots__ = ("carried", "accepted", "rejected")

    def __init__(self, max_drafts: int) -> None:
        super().__init__()
        self.carried, self.accepted, self.rejected = ([0.0] * max_drafts for _ in range(3))

    def count(self, weight: float, offered: Sequence[int], accepted: Sequence[int]) -> None:
        """Drafts offered and accepted in every row of a round, [B]."""
        for drafts, k in zip(offered, accepted):
            for j in range(drafts):
                self.carried[j] += weight
            for j in range(k):
                self.accepted[j] += weight
            if k < drafts:
                self.rejected[k] += weight

    def scale(self, factor: float) -> None:
        self.rounds, self.rows = factor * self.rounds, factor * self.rows
        self.tokens, self.seconds = factor * self.tokens, factor * self.seconds
        for sums in (self.carried, self.accepted, self.rejected):
            sums[:] = [factor * value for value in sums]

    @property
    def width(self) -> float:
        """Tokens in the target's forward."""
        return self.rows + sum(self.carried)


class Bucket:
    """Estimates and choice for batches of similar size.

    `settled` is the number of drafts believed best, `choice` the one to use now: another one during a probe.
    """

    def __init__(self, max_drafts: int, start: int, choices: set[int]) -> None:
        self.settled = self.choice = start
        self._choices = choices
        self._max_drafts = max_drafts
        self._arms = [Arm(max_drafts) for _ in range(max_drafts + 1)]
        # The weight of the newest round: it grows, so that older rounds decay without being touched.
        self._weight = 1.0
        # (tokens in the target's forward, seconds) of every measured arm, in order.
        self._points: list[tuple[float, float]] = []
        self._slow = False
        self._num_rounds = 0
        self._ignored, self._ignored_s = 2, 0.0  # rounds not to learn from, at least so long: the first of a new arm
        self._window, self._window_expected_s = Sums(), 0.0
        self._probe: Sums | None = None
        self._probe_start = self._num_probes = 0
        self._probe_gap = self._next_probe = MIN_PROBE_GAP
        self._probe_credit = MAX_PROBE_CREDIT  # rounds that probes may lose
        self._rate_to_beat = 0.0

    def observe(self, wanted: int, offered: Sequence[int], accepted: Sequence[int], seconds: float) -> None:
        """Learn from a round, then follow the probe, start one, or evaluate when it is time."""
        self._num_rounds += 1
        self._probe_credit = min(self._probe_credit + PROBE_LOSS, MAX_PROBE_CREDIT)
        expected_s = interpolate(self._points, len(offered) + sum(offered)) if self._points else seconds
        limit_s = STRAGGLER * expected_s
        was_slow, self._slow = self._slow, seconds > limit_s
        if (self._ignored > 0 or self._ignored_s > 0) and wanted == self.choice:
            self._ignored, self._ignored_s = self._ignored - 1, self._ignored_s - seconds
        elif was_slow or not self._slow:
            self._learn(wanted, offered, accepted, min(seconds, limit_s), expected_s)
        if self._probe:
            self._follow_probe(self._probe)
        elif self._num_rounds >= self._next_probe and self._probe_credit > 0:
            rates = self._rates()
            self._start_probe(self._unsure_arm(rates), rates)
        elif self._num_rounds % EVALUATE_ROUNDS == 0:
            self._evaluate()

    def draft_seconds(self) -> float:
        """Slope between the narrowest and the widest arm; 0 while only one was measured."""
        if len(self._points) < 2:
            return 0.0
        (x0, y0), (x1, y1) = self._points[0], self._points[-1]
        return max(y1 - y0, 0.0) / (x1 - x0) if x1 > x0 else 0.0

    def _learn(
        self, wanted: int, offered: Sequence[int], accepted: Sequence[int], seconds: float, expected_s: float
    ) -> None:
        of_round = len(offered), len(offered) + sum(accepted), seconds
        if wanted == self.choice:
            if self._probe:
                self._probe.add(1.0, *of_round)
            else:
                window = self._window
                window.add(1.0, *of_round)
                self._window_expected_s += expected_s
                if window.rounds >= CHANGE_ROUNDS and window.rows >= CHANGE_ROWS:
                    self._compare_window()
        weight = self._weight = self._weight * (1 + 1 / MEMORY_ROUNDS)
        self._arms[wanted].add(weight, *of_round)
        self._arms[wanted].count(weight, offered, accepted)
        if weight > 1e9:
            self._rescale()

    def _rescale(self) -> None:
        factor, self._weight = 1 / self._weight, 1.0
        for k, arm in enumerate(self._arms):
            arm.scale(factor)
            if arm.rounds <= FORGOTTEN_ROUNDS:
                self._arms[k] = Arm(self._max_drafts)

    def _compare_window(self) -> None:
        """Forget most and probe soon when the last rounds do not look like those before."""
        window, arm = self._window, self._arms[self.settled]
        slowdown = window.seconds / self._window_expected_s
        gain = window.tokens / window.rows / (arm.tokens / arm.rows) if arm.rows else 1.0
        if not (1 / CHANGE < slowdown < CHANGE and 1 / CHANGE < gain < CHANGE):
            self._weight *= FORGET
            self._next_probe, self._probe_gap = self._num_rounds, MIN_PROBE_GAP
            self._probe_credit = MAX_PROBE_CREDIT
        self._window, self._window_expected_s = Sums(), 0.0

    def _evaluate(self) -> None:
        """Settle on the best known arm; probe one that promises more as far as probes may lose."""
        rates = self._rates()
        if not self._num_probes:
            return
        self._settle(rates)
        best = max(self._choices, key=rates.__getitem__)
        if rates[best] > rates[self.settled] and self._probe_credit > 0:
            self._start_probe(best, rates)

    def _settle(self, rates: list[float]) -> None:
        known = [k for k in self._choices if self._arms[k].rounds >= KNOWN_ROUNDS * self._weight]
        best = max(known, key=rates.__getitem__, default=self.settled)
        if rates[best] > rates[self.settled]:
            self.settled = best
            self._window, self._window_expected_s = Sums(), 0.0
        self.choice = self.settled

    def _unsure_arm(self, rates: list[float]) -> int:
        """Alternately the least known of a grid (0, 1, 2, 4, … and all drafts) that may be best, and the likeliest."""
        others = self._choices - {self.settled}
        hoped = [rate * (1 + OPTIMISM / (1 + arm.rounds / self._weight) ** 0.5) for rate, arm in zip(rates, self._arms)]
        if self._num_probes % 2 == 0:
            grid = others.intersection(draft_grid(self._max_drafts))
            stale = STALE_ROUNDS * self._weight
            grid = [k for k in grid if hoped[k] > rates[self.settled] or self._arms[k].rounds < stale]
            if grid:
                return min(grid, key=lambda k: self._arms[k].rounds)
        return max(others, key=hoped.__getitem__)

    def _start_probe(self, k: int, rates: list[float]) -> None:
        self._rate_to_beat = rates[self.settled]
        self._probe, self._probe_start = Sums(), self._num_rounds
        self._num_probes += 1
        self._ignored, self._ignored_s = 1 if self.settled else 2, 0.0
        arm = self._arms[self.settled]
        if k == 0 and arm.rounds:  # the drafter still grows the trees of the round before, and slows the target down
            self._ignored_s = arm.seconds / arm.rounds
        self.choice = k

    def _follow_probe(self, probe: Sums) -> None:
        """End a probe that has had its rounds or cannot win; one that is ahead goes on for a while."""
        self._update_points()
        length = self._num_rounds - self._probe_start
        tokens_to_beat = self._rate_to_beat * probe.seconds
        is_hopeless = probe.rounds >= 2 and probe.rows * (1 + self.choice) < tokens_to_beat
        is_ahead = probe.tokens > tokens_to_beat
        is_over = length % (PROBE_ROUNDS if self.settled else PROBE_ROUNDS_OFF) == 0 and probe.rounds > 0
        if not is_hopeless and length < MAX_PROBE_ROUNDS and (is_ahead or not is_over):
            return
        probed, before, self._probe = self.choice, self.settled, None
        tokens, seconds = self._predict()
        self._settle(self._rates_of(tokens, seconds))
        best = self.settled
        lost_rounds = length * (seconds[probed] / seconds[best] - tokens[probed] / tokens[best])
        self._probe_credit -= max(lost_rounds, 0.0)
        self._probe_gap = min(2 * self._probe_gap, MAX_PROBE_GAP) if best == before else MIN_PROBE_GAP
        self._next_probe = self._num_rounds + self._probe_gap

    def _rates(self) -> list[float]:
        return self._rates_of(*self._predict())

    def _rates_of(self, tokens: list[float], seconds: list[float]) -> list[float]:
        plain, *speculative = (t / s for t, s in zip(tokens, seconds))
        return [(1 + SPECULATION_COST) * plain, *speculative]

    def _predict(self) -> tuple[list[float], list[float]]:
        """Tokens and seconds of a round of the batch, by number of drafts.

        A row accepts draft j if it carries so many, which differs from arm to arm, and if that draft and those before
        it are right, which differs more from one stretch of the text to the next and is learned from all arms together.
        """
        self._update_points()
        arms, prior_carried, prior_rows = self._arms, PRIOR_CARRIED * self._weight, PRIOR_ROWS * self._weight
        batch_size = sum(arm.rows for arm in arms) / sum(arm.rounds for arm in arms)
        carried, survival = self._pooled()
        tokens, seconds = [], []
        for k, arm in enumerate(arms):
            own = [(arm.carried[j] + prior_carried * carried[j]) / (arm.rows + prior_carried) for j in range(k)]
            expected = 1 + sum(c * s for c, s in zip(own, survival))
            tokens.append(batch_size * (arm.tokens + prior_rows * expected) / (arm.rows + prior_rows))
            seconds.append(interpolate(self._points, batch_size * (1 + sum(own))))
        return tokens, seconds

    def _pooled(self) -> tuple[list[float], list[float]]:
        """Over all arms, by draft: the chance that a row carries it if it may, and that it and all before it are right.

        What was hardly seen of a draft is taken from the one before it.
        """
        prior_tries = PRIOR_TRIES * self._weight
        carries, acceptance, surviving = 1.0, PRIOR_ACCEPTANCE, 1.0
        carried, survival = [], []
        for j in range(self._max_drafts):
            able = self._arms[j + 1 :]
            may = sum(arm.rows for arm in able) + self._weight
            carries = (sum(arm.carried[j] for arm in able) + self._weight * carries) / may
            accepted = sum(arm.accepted[j] for arm in self._arms)
            tried = accepted + sum(arm.rejected[j] for arm in self._arms)
            acceptance = (accepted + prior_tries * acceptance) / (tried + prior_tries)
            surviving *= acceptance
            carried.append(carries)
            survival.append(surviving)
        return carried, survival

    def _update_points(self) -> None:
        measured = [arm for arm in self._arms if arm.rounds]
        self._points = sorted((arm.width / arm.rounds, arm.seconds / arm.rounds) for arm in measured)


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear through points sorted by x; beyond them it follows the outermost slope where that rises."""
    if len(points) == 1:
        return points[0][1]
    i = bisect_left(points, (x,), 1, len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if x > x1:
        return y1 + max(slope, 0.0) * (x - x1)
    if x < x0:
        return max(y0 - max(slope, 0.0) * (x0 - x), y0 / 2)
    return y0 + slope * (x - x0)
