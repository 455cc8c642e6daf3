"""Predicted tokens per second of plain decoding, stock speculation and SSD (docs/theory.md, Throughput)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb, erf, sqrt
from typing import Any, Literal

from vllm_ssd.planning.profile import Acceptance, Costs, Profile
from vllm_ssd.policy import MAX_LEARNED_FAN_OUT, BranchBudget, allocate, jit_drafts, survival

Fallback = Literal["skip", "wait", "auto"]
MODEL_ERROR = 0.06
"""Relative standard deviation of the model with measured inputs (docs/tuning.md: half of 24 points within 4 %)."""
GUESS_ERROR = 0.3
"""Relative standard deviation of a prediction from guessed inputs."""
ITERATIONS = 40
"""Most fixed-point iterations."""
PHASES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Sampled remaining shares of the running step when an outcome reaches a busy drafter."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A configuration to predict.

    branch_budget: branches per request; on_miss: "auto" waits for just-in-time drafts where that pays, n-gram drafts
    are not modelled; num_drafters: drafters that share the requests evenly; wait_s: longest wait for just-in-time
    drafts; padded: every row is verified with K drafts and none waits, as on vLLM's V2 runner.
    """

    batch_size: int = 1
    num_drafts: int = 5
    branch_budget: int = 24
    on_miss: Fallback = "auto"
    num_drafters: int = 1
    wait_s: float = 0.05
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted throughput of one method at one setting.

    per_device: tokens per second per device; tokens_per_round, drafts_per_round: per row; hit_rate: share of outcomes
    with a branch that has drafts; late_rate: share whose branch has no draft yet; stall_s: part of round_s spent
    waiting for drafts; branch_budget, branches: branches per request, allowed and grown; relative_error: one standard
    deviation.
    """

    method: Literal["plain", "sd", "ssd"]
    batch_size: int
    num_drafts: int
    tokens_per_s: float
    per_device: float
    round_s: float
    tokens_per_round: float
    drafts_per_round: float = 0.0
    branch_budget: int = 0
    branches: int = 0
    on_miss: Fallback | None = None
    num_drafters: int = 0
    hit_rate: float = 0.0
    late_rate: float = 0.0
    stall_s: float = 0.0
    relative_error: float = 0.0


def predict_plain(profile: Profile, batch_size: int) -> Prediction:
    """Plain decoding: b / T_v(b, 1)."""
    round_s = profile.costs.verify_s(batch_size, 1)
    return _prediction(profile, "plain", batch_size, 0, 1.0, round_s, profile.costs.error, 0)


def predict_sd(profile: Profile, acceptance: Acceptance, batch_size: int, num_drafts: int) -> Prediction:
    """Stock speculation, drafting on the target's devices: b E(K) / (T_v(b, K + 1) + K t_s(b)).

    A parallel drafter takes one t_s(b) for any K.
    """
    costs = profile.costs
    round_s = costs.verify_s(batch_size, 1 + num_drafts) + costs.steps(num_drafts) * costs.sync_step_s(batch_size)
    probs = acceptance.accept_probs(num_drafts, after_hit=True)
    tokens = 1 + sum(k * prob for k, prob in enumerate(probs))
    error = _error(costs, acceptance, probs, tokens)
    return _prediction(
        profile, "sd", batch_size, num_drafts, tokens, round_s, error, 0, drafts_per_round=float(num_drafts)
    )


def predict_ssd(profile: Profile, acceptance: Acceptance, setting: Setting) -> Prediction:
    """SSD in its stationary state, by fixed-point iteration over the duration of a round.

    A row's state is the number of drafts it carries and whether they come from a hit. An outcome (k, t*) hits with the
    chance that F_k candidates cover t*; the branch's depth follows from the drafter's steps since the last outcome. The
    iteration is needed because a round's duration depends on the drafts its rows carry, and these on the duration.
    """
    costs, rows = profile.costs, -(-setting.batch_size // setting.num_drafters)
    chain = _Chain(acceptance, setting)
    round_s = costs.verify_s(setting.batch_size, 1 + setting.num_drafts) * costs.slowdown
    wait_s, branches = 0.0, 0
    for _ in range(ITERATIONS):
        branches = _branches(costs, setting, rows, round_s, chain)
        chain.advance(branches, _Reach(costs, setting, rows, rows * branches, round_s, chain.hit_rate))
        wait_s = chain.wait_s(costs, round_s)
        before = round_s
        drafts = setting.num_drafts if setting.padded else chain.drafts
        verify_s = costs.verify_s(setting.batch_size, 1 + drafts) * costs.slowdown
        round_s = (before + verify_s + costs.handover_s + wait_s) / 2
        if abs(round_s - before) < 1e-6 * before:
            break
    return _prediction(
        profile,
        "ssd",
        setting.batch_size,
        setting.num_drafts,
        chain.tokens,
        round_s,
        _error(costs, acceptance, chain.lengths, chain.tokens),
        setting.num_drafters,
        drafts_per_round=chain.drafts,
        branch_budget=setting.branch_budget,
        branches=branches,
        on_miss=setting.on_miss,
        hit_rate=chain.hit_rate,
        late_rate=chain.late_rate,
        stall_s=wait_s,
    )


class _Reach:
    """Distribution of the depth that branches reach between two outcomes."""

    def __init__(
        self, costs: Costs, setting: Setting, rows: int, branches: int, round_s: float, hit_rate: float
    ) -> None:
        self._step_s = costs.draft_step_s(branches, setting.num_drafts)
        self._alone_s = costs.draft_step_s(1, setting.num_drafts) if rows == 1 else self._step_s
        self._steps_of = costs.steps
        self._window_s = round_s - costs.handover_s - costs.latency_s
        self._scatter_s = max(costs.spread * round_s, 1e-9)
        self._max_depth = setting.num_drafts
        # Chance that the tree was complete at the outcome, including the extra step that finds the candidates at the
        # next round's last fork point. A tree that had to wait for its own last fork point needs one more step.
        num_steps = costs.steps(setting.num_drafts)
        at_once, later = (self._chance_in_time((num_steps + n) * self._step_s, busy=0.0) for n in (1, 2))
        self.finished = later / max(1 - hit_rate * (at_once - later), 1e-9)
        self.depths = [self._depths(0.0), self._depths(self._step_s), self._depths(self._alone_s)]
        self.parallel = bool(costs.parallel)
        if self.parallel:  # all fork points but the first wait for a step over the spines
            spines_s = costs.draft_step_s(rows, setting.num_drafts)
            self.finished = self._chance_in_time(spines_s + self._step_s, busy=0.0)
            self.depths = [self._depths(spines_s - self._step_s), *[self._depths(spines_s)] * 2]

    def _chance_in_time(self, needed_s: float, busy: float) -> float:
        """Chance that `needed_s` of steps fit into the window; busy: chance that a step is still running."""
        spare = [self._window_s - needed_s - busy * phase * self._step_s for phase in PHASES]
        return sum(0.5 + 0.5 * erf(s / (sqrt(2) * self._scatter_s)) for s in spare) / len(spare)

    def _depths(self, delay_s: float) -> list[float]:
        """Chance of each depth 0..K at the outcome, for a branch that starts `delay_s` into the window."""
        busy = 1 - self.finished
        at_least = [
            1.0,
            *(
                self._chance_in_time(delay_s + self._steps_of(j) * self._step_s, busy)
                for j in range(1, self._max_depth + 1)
            ),
            0.0,
        ]
        return [more - fewer for more, fewer in pairwise(at_least)]


class _Chain:
    """Markov chain over a row's states (drafts carried, whether after a hit)."""

    def __init__(self, acceptance: Acceptance, setting: Setting) -> None:
        self._acceptance, self._setting = acceptance, setting
        self._shares = {(setting.num_drafts, True): 1.0}
        self._counts: dict[tuple[int, bool, int], list[int]] = {}
        self._probs: dict[tuple[int, bool], list[float]] = {}
        self._jit = [0] * (setting.batch_size + 1)  # just-in-time drafts by number of missed rows
        self.hit_rate = self.late_rate = 0.0
        self.drafts, self.tokens = float(setting.num_drafts), 1.0
        m, shares = setting.num_drafts, self._accept_probs(setting.num_drafts, True)
        self.hit_chances = [
            sum(p * acceptance.covered(m, k, f) for k, (p, f) in enumerate(zip(shares, self._fan_out(m, True, n))))
            for n in range(setting.branch_budget + 1)
        ]
        self.survival = survival(shares)

    def advance(self, branches: int, reach: _Reach, rounds: int = 6) -> None:
        """Apply `rounds` transitions."""
        for _ in range(rounds):
            found, missed, late = self._outcomes(branches, reach)
            self.hit_rate, self.late_rate = sum(found.values()), late
            for num_drafts, chance in self._fallback().items():
                found[num_drafts, False] = missed * chance
            self._shares = found
            self.drafts = sum(m * share for (m, _), share in found.items())
            self.tokens = 1 + sum(k * prob for k, prob in enumerate(self.lengths))

    @property
    def lengths(self) -> list[float]:
        """P(k) over all states."""
        lengths = [0.0] * (self._setting.num_drafts + 1)
        for (m, after_hit), share in self._shares.items():
            for k, prob in enumerate(self._accept_probs(m, after_hit)):
                lengths[k] += share * prob
        return lengths

    def wait_s(self, costs: Costs, round_s: float) -> float:
        """Mean seconds per round spent waiting for just-in-time drafts.

        Also updates how many drafts are waited for, by number of missed rows.
        """
        setting, missing = self._setting, 1 - self.hit_rate
        accepted = survival(self._accept_probs(setting.num_drafts, False))
        rate = setting.batch_size * self.tokens / round_s
        self._jit, mean_s = [0], 0.0
        for missed in range(1, setting.batch_size + 1):
            step_s, first_s = jit_costs(costs, -(-missed // setting.num_drafters), setting.num_drafts)
            drafts = 0
            if setting.on_miss == "wait" and not setting.padded:
                drafts = setting.num_drafts
            elif setting.on_miss == "auto" and not setting.padded:
                drafts = jit_drafts(missed, setting.num_drafts, accepted, rate, first_s, step_s, setting.wait_s)
            self._jit.append(drafts)
            chance = _binomial(setting.batch_size, missed, missing)
            mean_s += chance * min(first_s + drafts * step_s, setting.wait_s) * (drafts > 0)
        return mean_s

    def _outcomes(self, branches: int, reach: _Reach) -> tuple[dict[tuple[int, bool], float], float, float]:
        """Share of rows by next state after a hit, share that missed or was late, and the late share alone."""
        found: dict[tuple[int, bool], float] = {}
        missed = late = 0.0
        for (m, after_hit), share in self._shares.items():
            probs = self._accept_probs(m, after_hit)
            for k, (prob, count) in enumerate(zip(probs, self._fan_out(m, after_hit, branches))):
                covered = share * prob * self._acceptance.covered(m, k, count)
                missed += share * prob - covered
                for depth, chance in enumerate(self._depths(m, k, reach)):
                    if depth:
                        found[depth, True] = found.get((depth, True), 0.0) + covered * chance
                    else:
                        late += covered * chance
        return found, missed + late, late

    def _depths(self, m: int, k: int, reach: _Reach) -> list[float]:
        """Distribution of a hit's depth.

        After full acceptance the branch may first have to wait for a forward of the last draft. A parallel drafter has
        to forward all of its drafts.
        """
        at_once, one_step_later, after_a_token = reach.depths
        if reach.parallel:
            return one_step_later if k or not m else at_once
        if k < m:
            return at_once
        if not m:
            return after_a_token
        known = reach.finished if m == self._setting.num_drafts else 0.0
        return [known * a + (1 - known) * b for a, b in zip(at_once, one_step_later)]

    def _fallback(self) -> dict[int, float]:
        """Distribution of the number of just-in-time drafts for a missed row."""
        missing = 1 - self.hit_rate
        chances: dict[int, float] = {}
        for others in range(self._setting.batch_size):
            drafts = self._jit[others + 1]
            chance = _binomial(self._setting.batch_size - 1, others, missing)
            chances[drafts] = chances.get(drafts, 0.0) + chance
        return chances

    def _accept_probs(self, m: int, after_hit: bool) -> list[float]:
        key = m, after_hit
        if key not in self._probs:
            self._probs[key] = self._acceptance.accept_probs(m, after_hit)
        return self._probs[key]

    def _fan_out(self, m: int, after_hit: bool, branches: int) -> list[int]:
        key = m, after_hit, branches
        if key not in self._counts:
            covered = self._acceptance.covered
            self._counts[key] = allocate(
                branches, self._accept_probs(m, after_hit), lambda k, f: 1 - covered(m, k, f), MAX_LEARNED_FAN_OUT
            )
        return self._counts[key]


def jit_costs(costs: Costs, branches: int, num_drafts: int) -> tuple[float, float]:
    """Seconds per just-in-time draft of `branches` branches, and seconds before the first draft."""
    step_s = costs.draft_step_s(branches, num_drafts)
    first_s = costs.latency_s + 0.5 * step_s
    return (0.0, first_s + 2 * step_s) if costs.parallel else (step_s, first_s)


def _branches(costs: Costs, setting: Setting, rows: int, round_s: float, chain: _Chain) -> int:
    """Branches per request that the drafter's `BranchBudget` would choose at these step and round times."""
    budget = BranchBudget(rows * setting.branch_budget, bool(costs.parallel))
    for i in range(16):
        branches = max(1, rows * setting.branch_budget * (1 + i % 4) // 4)
        tokens = branches * (setting.num_drafts if costs.parallel else 1)
        budget.observe_step(tokens, costs.draft_step_s(branches, setting.num_drafts))
    budget.observe_window(round_s)
    return budget.branches(setting.num_drafts, rows, chain.hit_chances, chain.survival)


def _binomial(n: int, k: int, chance: float) -> float:
    chance = min(max(chance, 0.0), 1.0)
    return comb(n, k) * chance**k * (1 - chance) ** (n - k)


def _error(costs: Costs, acceptance: Acceptance, lengths: Sequence[float], tokens: float) -> float:
    """Relative standard deviation from timing, from the number of rounds behind the acceptance, and from the model."""
    if not acceptance.rounds:
        return GUESS_ERROR
    variance = sum(prob * (1 + k - tokens) ** 2 for k, prob in enumerate(lengths))
    return sqrt(costs.error**2 + variance / tokens**2 / acceptance.rounds + MODEL_ERROR**2)


def _prediction(
    profile: Profile,
    method: Literal["plain", "sd", "ssd"],
    batch_size: int,
    num_drafts: int,
    tokens: float,
    round_s: float,
    error: float,
    num_drafters: int,
    **details: Any,
) -> Prediction:
    rate = batch_size * tokens / round_s
    return Prediction(
        method=method,
        batch_size=batch_size,
        num_drafts=num_drafts,
        tokens_per_s=rate,
        per_device=rate / (profile.target_devices + num_drafters * profile.drafter_devices),
        round_s=round_s,
        tokens_per_round=tokens,
        relative_error=GUESS_ERROR if profile.guessed else error,
        num_drafters=num_drafters,
        **details,
    )
