"""When to probe another number of drafts, for how long, and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_ssd.policy.estimator import MEMORY_ROUNDS, Prediction, RoundSums

SPECULATION_COST = 0.03
"""Relative gain over plain decoding that speculation must show, because it also slows prefill rounds, which are not
measured."""
EVALUATE_ROUNDS = 8
"""Rounds between two evaluations of the best arm."""
KNOWN_ROUNDS = 2.0
"""Rounds that suffice to judge an arm: decayed rounds to settle on it without a probe, or a probe's rounds to end the
probe early."""

STALE_ROUNDS = 0.5
"""Decayed rounds below which even an unpromising arm is probed again: its last probe may have been unlucky."""
OPTIMISM = 0.15
"""Relative rate credited to a never measured arm when choosing what to probe."""

PROBE_ROUNDS = 4
"""Rounds of a probe, unless it is ahead."""
MAX_PROBE_ROUNDS = 64
"""Most rounds of a probe that is ahead."""
SKIPPED_ROUNDS = 1
"""Rounds ignored at the start of a probe; none after plain decoding, where rounds are ignored anyway until the drafter
has caught up."""
CHANGE = 1.3
"""Ratio of measured to expected duration or tokens from which the load counts as changed."""

MIN_PROBE_GAP = 16
"""Rounds between a probe that changed something and the next. The gap doubles after each probe that changed nothing."""
MAX_PROBE_GAP = MEMORY_ROUNDS
"""Longest gap between probes in rounds, so that an arm is measured again before it is forgotten."""
MAX_PLAIN_GAP = 80
"""Longest gap during plain decoding, where only a probe can show that speculation pays again."""
PROBE_LOSS = 0.015
"""Share of all rounds that probes may cost."""
PROBE_CREDIT, MAX_PROBE_CREDIT = float(PROBE_ROUNDS), 3.0 * PROBE_ROUNDS
"""Rounds that probes may cost in advance, at the start and after a change (one fruitless probe), and the most that can
be saved up."""


def draft_grid(most: int) -> list[int]:
    """A logarithmic grid of numbers of drafts from 0 to `most` >= 1: 0, 1, 2, 4, … and `most`."""
    return sorted({0, *(1 << i for i in range(most.bit_length())), most})


@dataclass(slots=True)
class Probe:
    """An arm on trial."""

    arm: int
    rate_to_beat: float  # tokens per second of the settled arm
    expected_s: float  # mean duration of this arm's earlier rounds, 0 if too few were measured
    needed_s: float  # duration below which its rounds beat the settled arm, given the predicted tokens
    num_rounds: int = 0
    lost_s: float = 0.0  # time lost while the drafter caught up
    sums: RoundSums = field(default_factory=RoundSums)  # over the rounds that were not skipped
    is_changed: bool = False  # its rounds take a different time than before

    @property
    def mean_s(self) -> float:
        """Duration of its counted rounds in seconds."""
        return self.sums.seconds / self.sums.rounds


class ProbeController:
    """Settles on the arm with the most tokens per second, and probes others within a budget of lost rounds.

    An arm is a number of drafts. `settled` is the arm believed to be best; `choice` is the arm to use now, which
    differs during a probe. `predict` returns the current estimates for all arms.
    """

    def __init__(self, arms: Iterable[int], start: int, predict: Callable[[], Prediction]) -> None:
        self.settled = self.choice = start
        self._arms = set(arms)
        self._grid = draft_grid(max(self._arms))
        self._predict = predict
        self._num_rounds = self._num_probes = 0
        # Rounds and seconds to skip after a change of arms. The initial value is higher because the drafter is starting
        # too. Seconds are skipped before plain rounds: the drafter slows them until its last trees are grown.
        self._skip_rounds, self._skip_s = 2 * SKIPPED_ROUNDS, 0.0
        self._probe: Probe | None = None
        self._gap = self._next_probe = MIN_PROBE_GAP
        self._credit = PROBE_CREDIT  # rounds that probes may cost
        self._plain_first = False
        self._was_slow = False  # the last probe started from plain decoding and its rounds took too long

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
        """Count one round of the running probe: rows, tokens emitted by all rows, duration. False if no probe runs."""
        if self._probe is None:
            return False
        self._probe.sums.add(1.0, rows, tokens, seconds)
        return True

    def finds_change(self) -> bool:
        """Whether this probe's rounds take a different time than the arm's earlier ones; true once per probe."""
        probe = self._probe
        if probe is None or probe.is_changed or not probe.expected_s or probe.sums.rounds < PROBE_ROUNDS:
            return False
        probe.is_changed = differs(probe.mean_s / probe.expected_s)
        return probe.is_changed

    def wait(self, rows: int, tokens: int, seconds: float) -> None:
        """Charge a round in which the drafter was behind to the running probe, without learning from it.

        A probe from plain decoding ends if such a round takes too long, because the busy drafter slows the target.
        """
        if (probe := self._probe) is None:
            return
        probe.lost_s += seconds - tokens / probe.rate_to_beat
        if not self.settled and seconds > probe.needed_s:
            self._end(probe, is_slow=True)

    def restart(self, slower: bool = False) -> None:
        """Probe soon and as much as at the start, because the load has changed.

        slower: rounds take longer than before, so try plain decoding first
        """
        self._next_probe, self._gap = self._num_rounds, MIN_PROBE_GAP
        self._plain_first = slower and self.settled > 0 and 0 in self._arms
        self._credit = max(self._credit, MAX_PROBE_CREDIT if slower else PROBE_CREDIT)

    def step(self) -> None:
        """Advance by one round: continue or end the probe, start one that is due, or re-evaluate the best arm."""
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
        """Settle on the best known arm; if another promises more and credit remains, probe it."""
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
        """The arm to probe next.

        Alternates between the least known grid arm that may be best or is stale, and the most promising arm. From plain
        decoding always the latter, since any arm shows whether speculation pays again.
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
        """End a probe that has had its rounds or cannot win; continue one that is ahead."""
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
        """Settle on the best arm, charge the probe's cost, and schedule the next probe.

        is_slow: the probe started from plain decoding and its rounds took too long. If the next probe's rounds are fast
        enough, the load has changed, so another follows soon whatever those few rounds emitted.
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
    """Whether the ratio of a measured to an expected value indicates a change of load."""
    return not 1 / CHANGE < ratio < CHANGE


def handicapped(prediction: Prediction) -> list[float]:
    """Predicted tokens per second by arm, with SPECULATION_COST added to plain decoding."""
    plain, *speculative = prediction.rates
    return [(1 + SPECULATION_COST) * plain, *speculative]


def lost_rounds(prediction: Prediction, probe: Probe, best: int) -> float:
    """Cost of a probe in rounds of the arm `best`; negative if the probe was ahead."""
    tokens, seconds = prediction.tokens, prediction.seconds
    took_s = probe.mean_s if probe.sums.rounds else seconds[probe.arm]
    return probe.num_rounds * (took_s / seconds[best] - tokens[probe.arm] / tokens[best])
