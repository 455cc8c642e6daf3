"""When to try another number of drafts, for how long, and what that may cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_ssd.policy.estimator import MEMORY_ROUNDS, Prediction, RoundSums

SPECULATION_COST = 0.03
"""Relative rate that speculation must gain over plain decoding: it also slows rounds with prompts, never measured."""
EVALUATE_ROUNDS = 8
"""Rounds between two looks for the best arm."""
KNOWN_ROUNDS = 2.0
"""Rounds that judge an arm: decayed ones to settle on it without a probe, those of a probe to give it up early."""

STALE_ROUNDS = 0.5
"""Decayed rounds below which even an arm that promises little is probed again: it may have been unlucky."""
OPTIMISM = 0.15
"""Relative rate credited to an arm that was never measured when choosing what to probe."""

PROBE_ROUNDS = 4
"""Rounds of a probe that is not ahead."""
MAX_PROBE_ROUNDS = 64
"""Most rounds of a probe, which goes on while it is ahead."""
SKIPPED_ROUNDS = 1
"""Rounds at the start of a probe from which nothing is learned; none after plain decoding, where the drafter has
caught up before they count."""
CHANGE = 1.3
"""Ratio of duration or tokens, to what was expected, from which the load counts as changed."""

MIN_PROBE_GAP = 16
"""Rounds from a probe that changed something to the next. The gap doubles after each probe that changed nothing."""
MAX_PROBE_GAP = MEMORY_ROUNDS
"""Longest gap between probes in rounds: an arm is measured again before it is forgotten."""
MAX_PLAIN_GAP = 80
"""The same while decoding is plain, when nothing else shows that speculation would pay again."""
PROBE_LOSS = 0.015
"""Share of all rounds that probes may lose."""
PROBE_CREDIT, MAX_PROBE_CREDIT = float(PROBE_ROUNDS), 3.0 * PROBE_ROUNDS
"""Rounds that probes may lose in advance, at the start and after a change: one probe that yields nothing; and the most
that they may save up."""


def draft_grid(most: int) -> list[int]:
    """Numbers of drafts that stand for all from 0 to `most` >= 1: 0, 1, 2, 4, … and `most`."""
    return sorted({0, *(1 << i for i in range(most.bit_length())), most})


@dataclass(slots=True)
class Probe:
    """An arm on trial: its rounds so far, those that were learned from, and the tokens per second to beat."""

    arm: int
    rate_to_beat: float
    expected_s: float  # of its rounds, as far as they were measured before, else 0
    needed_s: float  # its rounds must take less to be worth it, if they emit what is predicted
    num_rounds: int = 0
    lost_s: float = 0.0  # while the drafter caught up
    sums: RoundSums = field(default_factory=RoundSums)
    is_changed: bool = False  # its rounds do not take what they took before

    @property
    def mean_s(self) -> float:
        """Duration of its counted rounds in seconds."""
        return self.sums.seconds / self.sums.rounds


class ProbeController:
    """Settles on the arm with the most tokens per second, and probes others within a budget of lost rounds.

    An arm is a number of drafts. `settled` is the arm believed best; `choice` is the arm to use now, another one during
    a probe. `predict` says what is believed of every arm.
    """

    def __init__(self, arms: Iterable[int], start: int, predict: Callable[[], Prediction]) -> None:
        self.settled = self.choice = start
        self._arms = set(arms)
        self._grid = draft_grid(max(self._arms))
        self._predict = predict
        self._num_rounds = self._num_probes = 0
        # Rounds and seconds at the start of an arm that are still to be skipped. At first the drafter starts, too, and
        # plain rounds are slow while it still grows the trees of the round before.
        self._skip_rounds, self._skip_s = 2 * SKIPPED_ROUNDS, 0.0
        self._probe: Probe | None = None
        self._gap = self._next_probe = MIN_PROBE_GAP
        self._credit = PROBE_CREDIT  # rounds that probes may lose
        self._plain_first = False
        self._was_slow = False  # the last probe was one from plain decoding that took too long

    @property
    def is_probing(self) -> bool:
        """Whether `choice` is on trial."""
        return self._probe is not None

    def skips(self, seconds: float) -> bool:
        """Whether a round of `choice` that took `seconds` is too close to a change of arms to learn from."""
        if self._skip_rounds <= 0 and self._skip_s <= 0:
            return False
        self._skip_rounds, self._skip_s = self._skip_rounds - 1, self._skip_s - seconds
        return True

    def count(self, rows: int, tokens: int, seconds: float) -> bool:
        """Count one round of `choice`: rows, tokens emitted by all of them, duration. False when no probe runs."""
        if self._probe is None:
            return False
        self._probe.sums.add(1.0, rows, tokens, seconds)
        return True

    def finds_change(self) -> bool:
        """Whether the rounds of this probe take another time than such rounds did before; says so once a probe."""
        probe = self._probe
        if probe is None or probe.is_changed or not probe.expected_s or probe.sums.rounds < PROBE_ROUNDS:
            return False
        probe.is_changed = differs(probe.mean_s / probe.expected_s)
        return probe.is_changed

    def wait(self, rows: int, tokens: int, seconds: float) -> None:
        """A round of `choice` in which the drafter was behind: a probe waits for it, at its own expense.

        A probe from plain decoding ends where that round takes too long, as if drafts had been in it: the drafter at
        work slows the target.
        """
        if (probe := self._probe) is None:
            return
        probe.lost_s += seconds - tokens / probe.rate_to_beat
        if not self.settled and seconds > probe.needed_s:
            self._end(probe, is_slow=True)

    def restart(self, slower: bool = False) -> None:
        """Probe soon, and as much as at the start: the past says little about what is best now.

        slower: rounds take longer than they did, so that plain decoding is tried first
        """
        self._next_probe, self._gap = self._num_rounds, MIN_PROBE_GAP
        self._plain_first = slower and self.settled > 0 and 0 in self._arms
        self._credit = max(self._credit, MAX_PROBE_CREDIT if slower else PROBE_CREDIT)

    def step(self) -> None:
        """After every round: follow the probe, start the next when it is due, or settle on the best arm."""
        self._num_rounds += 1
        self._credit = min(self._credit + PROBE_LOSS, MAX_PROBE_CREDIT)
        if self._probe:
            self._follow(self._probe)
        elif self._num_rounds >= self._next_probe and self._credit > 0:
            prediction = self._predict()
            self._start(0 if self._plain_first else self._unsure_arm(prediction), prediction)
            self._plain_first = False
        elif self._num_rounds % EVALUATE_ROUNDS == 0 and self._num_probes:
            self._evaluate()

    def _evaluate(self) -> None:
        """Settle on the best known arm; probe one that promises more as far as probes may lose."""
        prediction = self._predict()
        self._settle(prediction)
        rates = handicapped(prediction)
        best = max(self._arms, key=rates.__getitem__)
        if rates[best] > rates[self.settled] and self._credit > 0:
            self._start(best, prediction)

    def _settle(self, prediction: Prediction) -> None:
        rates = handicapped(prediction)
        known = [k for k in self._arms if prediction.evidence[k] >= KNOWN_ROUNDS]
        best = max(known, key=rates.__getitem__, default=self.settled)
        if rates[best] > rates[self.settled]:
            self.settled = best
        if self.choice and not self.settled:
            self._skip_s = prediction.seconds[self.choice]
        self.choice = self.settled

    def _unsure_arm(self, prediction: Prediction) -> int:
        """Alternately the least known arm of the grid that may be best or is stale, and the one that promises most.

        From plain decoding the latter alone: any arm shows whether speculation pays again.
        """
        rates, evidence = handicapped(prediction), prediction.evidence
        others = self._arms - {self.settled}
        hoped = [rate * (1 + OPTIMISM / (1 + rounds) ** 0.5) for rate, rounds in zip(rates, evidence)]
        if self.settled and self._num_probes % 2 == 0:
            grid = others.intersection(self._grid)
            if unsure := [k for k in grid if hoped[k] > rates[self.settled] or evidence[k] < STALE_ROUNDS]:
                return min(unsure, key=evidence.__getitem__)
        return max(others, key=hoped.__getitem__)

    def _start(self, arm: int, prediction: Prediction) -> None:
        rate = handicapped(prediction)[self.settled]
        expected_s = prediction.measured_s[arm] if prediction.evidence[arm] >= KNOWN_ROUNDS else 0.0
        self._probe = Probe(arm, rate, expected_s, prediction.tokens[arm] / rate)
        self._num_probes += 1
        self._skip_rounds = SKIPPED_ROUNDS if self.settled else 0
        self._skip_s = 0.0 if arm else prediction.measured_s[self.settled]
        self.choice = arm

    def _follow(self, probe: Probe) -> None:
        """End a probe that has had its rounds or cannot win; one that is ahead goes on."""
        probe.num_rounds += 1
        sums, tokens_to_beat = probe.sums, probe.rate_to_beat * probe.sums.seconds
        is_hopeless = sums.rounds >= KNOWN_ROUNDS and sums.rows * (1 + probe.arm) < tokens_to_beat
        is_slow = not self.settled and sums.rounds > 0 and probe.mean_s > CHANGE * probe.needed_s
        is_ahead = sums.tokens > tokens_to_beat
        is_over = probe.num_rounds % PROBE_ROUNDS == 0 and sums.rounds > 0
        is_hopeless |= is_slow
        if not is_hopeless and probe.num_rounds < MAX_PROBE_ROUNDS and (is_ahead or not is_over):
            return
        self._end(probe, is_slow)

    def _end(self, probe: Probe, is_slow: bool) -> None:
        """Settle on the best arm, pay for the probe, and say when the next one is due.

        is_slow: it was one from plain decoding, and its rounds took too long. A probe after it whose rounds are quick
        enough shows that the load has changed: the next comes soon, whatever these few rounds emitted.
        """
        before, self._probe = self.settled, None
        prediction = self._predict()
        self._settle(prediction)
        waited = probe.lost_s / prediction.seconds[before]
        self._credit -= max(lost_rounds(prediction, probe, self.settled) + waited, 0.0)
        longest = MAX_PROBE_GAP if self.settled else MAX_PLAIN_GAP
        is_quick = probe.sums.rounds > 0 and probe.mean_s <= probe.needed_s
        has_changed = self.settled != before or (self._was_slow and is_quick)
        self._gap = MIN_PROBE_GAP if has_changed else min(2 * self._gap, longest)
        self._was_slow = is_slow
        self._next_probe = self._num_rounds + self._gap
        if probe.is_changed and self.settled and probe.mean_s > probe.expected_s:
            self.restart(slower=True)


def differs(ratio: float) -> bool:
    """Whether a ratio of what was measured to what was expected says that the load has changed."""
    return not 1 / CHANGE < ratio < CHANGE


def handicapped(prediction: Prediction) -> list[float]:
    """Tokens per second, those of plain decoding raised by what speculation must gain."""
    plain, *speculative = prediction.rates
    return [(1 + SPECULATION_COST) * plain, *speculative]


def lost_rounds(prediction: Prediction, probe: Probe, best: int) -> float:
    """Rounds of the arm `best` whose tokens a probe's rounds fell short by; negative when it was ahead."""
    tokens, seconds = prediction.tokens, prediction.seconds
    took_s = probe.mean_s if probe.sums.rounds else seconds[probe.arm]
    return probe.num_rounds * (took_s / seconds[best] - tokens[probe.arm] / tokens[best])
