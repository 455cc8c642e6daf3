"""How many drafts a round should carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEMORY_ROUNDS = 256
"""Rounds after which an observation's weight has fallen to 1 / e."""
EVALUATE_ROUNDS = 8
HYSTERESIS = 1.02
"""Predicted gain in tokens per second that a switch takes."""
PRIOR_ROWS = 16.0
"""Row-rounds that the model of acceptance by draft position weighs against an arm's own rows."""
KNOWN_ROUNDS = 2.0
"""Decayed rounds for an arm to be switched to without a probe."""
PROBE_ROUNDS, PROBE_ROUNDS_OFF, MAX_PROBE_ROUNDS = 4, 8, 64
MIN_PROBE_GAP, MAX_PROBE_GAP = 32, 256
PROBE_LOSS = 0.01
"""Share of all rounds' time that probes may lose."""
OPTIMISM = 0.3
WINDOW_ROUNDS = 32
CHANGE = 1.25
"""Ratio of a window's mean duration to the remembered one that says that the environment has changed."""
FORGET = 16.0
"""Factor by which all earlier rounds then lose weight."""


class Adaptation:
    """Number of drafts with the most tokens per second, learned per batch size.

    Batch sizes share a bucket up to the next power of two. Each bucket predicts, for 0 to num_speculative_tokens
    drafts, a row's tokens and a round's seconds, and now and then tries another number for a few rounds.
    """

    def __init__(self, num_speculative_tokens: int) -> None:
        self._max_drafts = num_speculative_tokens
        self._buckets: dict[int, Bucket] = {}

    def observe(
        self, batch_size: int, wanted: int, offered: Sequence[int], accepted: Sequence[int], seconds: float
    ) -> None:
        """Learn from one round in which every row decoded.

        wanted: the drafts asked for; offered, accepted [batch_size]: drafts verified and accepted; seconds: duration.
        """
        self._bucket(batch_size).observe(batch_size, wanted, sum(offered), accepted, seconds)

    def choose(self, batch_size: int) -> int:
        """Number of drafts for the next round; 0 is plain decoding."""
        return self._bucket(batch_size).choice

    def _bucket(self, batch_size: int) -> Bucket:
        key = (batch_size - 1).bit_length()
        bucket = self._buckets.get(key)
        if bucket is None:
            near = min(self._buckets, key=lambda other: abs(other - key), default=None)
            start = self._max_drafts if near is None else self._buckets[near].settled
            bucket = self._buckets[key] = Bucket(self._max_drafts, start)
        return bucket


@dataclass(slots=True)
class Arm:
    """Weighted sums over rounds that wanted the same number of drafts."""

    rounds: float = 0.0
    rows: float = 0.0
    drafts: float = 0.0
    accepted: float = 0.0
    seconds: float = 0.0

    def add(self, weight: float, rows: int, drafts: int, accepted: int, seconds: float) -> None:
        self.rounds += weight
        self.rows += weight * rows
        self.drafts += weight * drafts
        self.accepted += weight * accepted
        self.seconds += weight * seconds

    def scale(self, factor: float) -> None:
        self.rounds *= factor
        self.rows *= factor
        self.drafts *= factor
        self.accepted *= factor
        self.seconds *= factor


class Bucket:
    """Estimates and choice for batches of similar size.

    `settled` is the number of drafts believed best, `choice` the one to use now: another one during a probe.
    """

    def __init__(self, max_drafts: int, start: int) -> None:
        self.settled = self.choice = start
        self._arms = [Arm() for _ in range(max_drafts + 1)]
        # Row-rounds that could and that did accept draft j + 1, having accepted j.
        self._tried = [0.0] * max_drafts
        self._passed = [0.0] * max_drafts
        # Newer rounds weigh more, so that older ones decay without being touched.
        self._weight = 1.0
        # The last three durations by drafts per row (plain decoding under -1): their median drops stragglers.
        self._recent: dict[int, list[float]] = {}
        self._window = Arm()
        self._probe: Arm | None = None
        self._probe_start = self._ignored = 0
        self._rate_to_beat = 0.0
        self._num_rounds = self._num_probes = 0
        self._probe_gap = self._next_probe = self._debt_end = MIN_PROBE_GAP

    def observe(self, batch_size: int, wanted: int, drafts: int, accepted: Sequence[int], seconds: float) -> None:
        self._num_rounds += 1
        if self._ignored and wanted == self.choice:
            self._ignored -= 1
        else:
            self._learn(batch_size, wanted, drafts, accepted, seconds)
        if self._probe:
            self._follow_probe(self._probe)
        elif self._num_rounds >= self._next_probe:
            self._start_probe(self._least_known())
        elif self._num_rounds % EVALUATE_ROUNDS == 0 and self._num_probes:
            self._evaluate()

    def _learn(self, batch_size: int, wanted: int, drafts: int, accepted: Sequence[int], seconds: float) -> None:
        recent = self._recent.setdefault(round(drafts / batch_size) if wanted else -1, [])
        recent.append(seconds)
        if len(recent) > 3:
            del recent[0]
        seconds = sorted(recent)[(len(recent) - 1) // 2]
        sums = batch_size, drafts, sum(accepted), seconds
        self._weight *= 1 + 1 / MEMORY_ROUNDS
        if wanted == self.choice:
            (self._probe or self._window).add(1.0, *sums)
            if self._window.rounds == WINDOW_ROUNDS:
                self._compare_window()
        self._arms[wanted].add(self._weight, *sums)
        if wanted:
            num_rows = [0] * (wanted + 1)
            for length in accepted:
                num_rows[length] += 1
            at_least = self._weight * batch_size
            for j in range(wanted):
                self._tried[j] += at_least
                at_least -= self._weight * num_rows[j]
                self._passed[j] += at_least
        if self._weight > 1e9:
            self._rescale()

    def _compare_window(self) -> None:
        window, arm = self._window, self._arms[self.settled]
        ratio = window.seconds / window.rounds * arm.rounds / arm.seconds if arm.rounds else 1.0
        if not 1 / CHANGE < ratio < CHANGE:
            self._weight *= FORGET
            self._next_probe = self._debt_end = self._num_rounds
            self._probe_gap = MIN_PROBE_GAP
        self._window = Arm()

    def _rescale(self) -> None:
        factor, self._weight = 1 / self._weight, 1.0
        self._tried = [value * factor for value in self._tried]
        self._passed = [value * factor for value in self._passed]
        for arm in self._arms:
            arm.scale(factor)

    def _evaluate(self) -> None:
        """Settle on the best arm that is known; probe one that promises more, once earlier losses are paid off."""
        tokens, seconds = self._predict()
        rates = [t / s for t, s in zip(tokens, seconds)]
        known = [k for k, arm in enumerate(self._arms) if arm.rounds >= KNOWN_ROUNDS * self._weight]
        best = max(known, key=rates.__getitem__, default=self.settled)
        if rates[best] > HYSTERESIS * rates[self.settled]:
            self._settle(best)
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] > HYSTERESIS * rates[self.settled] and self._num_rounds >= self._debt_end:
            self._start_probe(best)

    def _settle(self, k: int) -> None:
        self.settled = self.choice = k
        self._window = Arm()
        self._recent.clear()

    def _least_known(self) -> int:
        """Alternately the least known of none, half and all drafts, and the arm that might be best."""
        last = len(self._arms) - 1
        others = {0, last // 2, last} - {self.settled}
        if self._num_probes % 2 == 0:
            return min(others, key=lambda k: self._arms[k].rounds)
        tokens, seconds = self._predict()
        rounds = [arm.rounds / self._weight for arm in self._arms]
        return max(
            (k for k in range(last + 1) if k != self.settled),
            key=lambda k: tokens[k] / seconds[k] * (1 + OPTIMISM / (1 + rounds[k]) ** 0.5),
        )

    def _start_probe(self, k: int) -> None:
        tokens, seconds = self._predict()
        self._rate_to_beat = tokens[self.settled] / seconds[self.settled] * self._batch_size()
        self._probe, self._probe_start = Arm(), self._num_rounds
        self._num_probes += 1
        # A round that still carries what was drafted for another arm tells nothing; the drafter has to catch up too.
        self._ignored = 1 if self.settled else 2
        self.choice = k
        self._recent.clear()

    def _follow_probe(self, probe: Arm) -> None:
        """End a probe that has had its rounds or cannot win; one that does better than expected goes on."""
        length = self._num_rounds - self._probe_start
        hopeless = probe.rounds > 1 and probe.rows * (1 + self.choice) < self._rate_to_beat * probe.seconds
        if not hopeless:
            if length % (PROBE_ROUNDS if self.settled else PROBE_ROUNDS_OFF):
                return
            if probe.rows + probe.accepted > self._rate_to_beat * probe.seconds and length < MAX_PROBE_ROUNDS:
                return
        probed, before = self.choice, self.settled
        self._probe = None
        self._settle(before)
        self._evaluate()
        if self._probe:
            return
        tokens, seconds = self._predict()
        lost = length * (seconds[probed] / seconds[self.settled] - tokens[probed] / tokens[self.settled])
        self._debt_end = self._num_rounds + int(lost / PROBE_LOSS)
        self._probe_gap = min(2 * self._probe_gap, MAX_PROBE_GAP) if self.settled == before else MIN_PROBE_GAP
        self._next_probe = max(self._num_rounds + self._probe_gap, self._debt_end)

    def _batch_size(self) -> float:
        return sum(arm.rows for arm in self._arms) / sum(arm.rounds for arm in self._arms)

    def _predict(self) -> tuple[list[float], list[float]]:
        """Tokens of a row and seconds of a round, by number of drafts."""
        arms = self._arms
        batch_size = self._batch_size()
        wanted = sum(k * arm.rows for k, arm in enumerate(arms))
        fill = sum(arm.drafts for arm in arms) / wanted if wanted else 1.0
        points = sorted(
            ((arm.rows + arm.drafts) / arm.rounds, arm.seconds / arm.rounds) for arm in arms if arm.rounds
        )
        tokens, seconds, expected, survival = [], [], 1.0, 1.0
        for k, arm in enumerate(arms):
            if k:
                survival *= (self._passed[k - 1] + self._weight) / (self._tried[k - 1] + 2 * self._weight)
                expected += survival
            prior = PRIOR_ROWS * self._weight
            tokens.append((arm.rows + arm.accepted + prior * expected) / (arm.rows + prior))
            load = arm.drafts / arm.rows if arm.rows else k * fill
            seconds.append(interpolate(points, batch_size * (1 + load)))
        return tokens, seconds


def interpolate(points: list[tuple[float, float]], x: float) -> float:
    """Piecewise linear through points sorted by x; beyond them the outermost slope where it rises, else flat."""
    if len(points) == 1:
        return points[0][1]
    index = 1
    while index < len(points) - 1 and points[index][0] < x:
        index += 1
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if x0 <= x <= x1:
        return y0 + slope * (x - x0)
    slope = max(slope, 0.0)
    return y1 + slope * (x - x1) if x > x1 else max(y0 - slope * (x0 - x), y0 / 2)
