"""The profile of a target and its drafter: costs and acceptance, measured or guessed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import msgspec

from vllm_ssd.policy import MAX_LEARNED_FAN_OUT
from vllm_ssd.policy.curve import Point, interpolate

PRIOR_ROUNDS = 4.0
"""Prior weight, in rounds, of the pooled acceptance rate at each draft position."""
MIN_ROUNDS = 30
"""Rounds needed to estimate a class of outcomes separately."""

Round = tuple[int, int, int | None, bool]
"""An outcome: drafts verified, accept length k, rank of t* from 0 (None if no candidate), whether after a hit."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations in seconds.

    verify: (rows, tokens per row, seconds) of a target round, including host work; draft_step: (branches, seconds) of
    one drafter step; sync_step: (rows, seconds) of one draft step on the target's own devices (default: draft_step);
    handover_s: host time that SSD adds to a round; latency_s: time from an outcome to the drafter's next step plus time
    from a push to its arrival; slowdown: factor on a target round while a drafter computes; spread: relative standard
    deviation of a round's duration; error: relative error of the mean durations; parallel: drafts per branch that each
    step of draft_step drew, 0 for a drafter that draws one draft per step.
    """

    verify: tuple[tuple[int, int, float], ...]
    draft_step: tuple[Point, ...]
    sync_step: tuple[Point, ...] = ()
    handover_s: float = 0.0
    latency_s: float = 0.0
    slowdown: float = 1.0
    spread: float = 0.05
    error: float = 0.02
    parallel: int = 0

    def __post_init__(self) -> None:
        if not self.verify or not self.draft_step:
            raise ValueError("costs need at least one verification and one draft step")
        if any(value <= 0 for point in (*self.verify, *self.draft_step, *self.sync_step) for value in point):
            raise ValueError("rows, tokens, branches and seconds must be over 0")
        for name, points in (("draft_step", self.draft_step), ("sync_step", self.sync_step)):
            if [x for x, _ in points] != sorted({x for x, _ in points}):
                raise ValueError(f"{name} must be sorted by its first number, each given once")

    def verify_s(self, rows: float, tokens_per_row: float) -> float:
        """Duration of a target round; depends on the total tokens only if a single batch size was measured."""
        by_rows: dict[int, list[Point]] = {}
        for measured, tokens, seconds in sorted(self.verify):
            by_rows.setdefault(measured, []).append((tokens, seconds))
        if len(by_rows) == 1:
            ((measured, points),) = by_rows.items()
            return interpolate(points, rows * tokens_per_row / measured)
        return interpolate([(n, interpolate(points, tokens_per_row)) for n, points in by_rows.items()], rows)

    def draft_step_s(self, branches: float, num_drafts: int = 0) -> float:
        """Duration of one drafter step over `branches` branches; num_drafts: drafts per branch of a parallel step."""
        if self.parallel and num_drafts:
            branches *= num_drafts / self.parallel
        return interpolate(self.draft_step, branches)

    def steps(self, num_drafts: int) -> int:
        """Number of steps that drawing `num_drafts` drafts of a branch takes."""
        return min(num_drafts, 1) if self.parallel else num_drafts

    def sync_step_s(self, rows: float) -> float:
        """Duration of one draft step on the target's own devices."""
        return interpolate(self.sync_step or self.draft_step, rows)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Acceptance and coverage at one temperature.

    after_hit, after_miss [K]: chance that draft j + 1 is accepted given that the j before it were, for drafts from a
    branch and for just-in-time drafts; the last value also applies beyond K. rejected, accepted, undrafted [F]: chance
    that t* is among the first f + 1 candidates after a rejection, after full acceptance, and after a round without
    drafts; the last value also applies beyond F. saguaro: the factor C; rounds: number of measured rounds, 0 for a
    prior.
    """

    after_hit: tuple[float, ...]
    after_miss: tuple[float, ...]
    rejected: tuple[float, ...]
    accepted: tuple[float, ...]
    undrafted: tuple[float, ...]
    temperature: float = 0.0
    saguaro: float = 1.0
    rounds: int = 0

    def __post_init__(self) -> None:
        for name in ("after_hit", "after_miss", "rejected", "accepted", "undrafted"):
            values = getattr(self, name)
            if not values or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{name} must hold probabilities")
        for values in (self.rejected, self.accepted, self.undrafted):
            if list(values) != sorted(values):
                raise ValueError("rejected, accepted and undrafted must not decrease")

    def accept_probs(self, num_drafts: int, after_hit: bool) -> list[float]:
        """P(k) of a round of `num_drafts` drafts: num_drafts + 1 probabilities that sum to 1."""
        chances = self.after_hit if after_hit else self.after_miss
        padded = [*chances[:num_drafts], *[chances[-1]] * (num_drafts - len(chances))]
        survival = list(accumulate(padded, lambda alive, chance: alive * chance, initial=1.0))
        return [*(a - b for a, b in zip(survival, survival[1:])), survival[-1]]

    def covered(self, num_drafts: int, accept_length: int, candidates: int) -> float:
        """Chance that `candidates` branches at `accept_length` contain the bonus token."""
        if not candidates:
            return 0.0
        curve = self.rejected if accept_length < num_drafts else self.accepted if num_drafts else self.undrafted
        return curve[min(candidates, len(curve)) - 1]

    @classmethod
    def prior(cls, acceptance: float, r: float = 1.0, first: float = 0.6, temperature: float = 0.0) -> Acceptance:
        """A guess: independent acceptance, and coverage by a Pareto law, 1 - (1 - first) * F^-r."""
        curve = tuple(1 - (1 - first) * f**-r for f in range(1, MAX_LEARNED_FAN_OUT + 1))
        return cls((acceptance,), (acceptance,), curve, curve, curve, temperature)

    @classmethod
    def from_rounds(
        cls, rounds: Iterable[Round], num_drafts: int, temperature: float = 0.0, saguaro: float = 1.0
    ) -> Acceptance:
        """Estimate from recorded rounds, smoothed towards the pooled rate; raises ValueError for fewer than 30 rounds.

        With fewer than 30 rounds after a miss, after_miss is after_hit. A coverage curve with fewer than 30 ranks is
        estimated from all rounds.
        """
        rounds = list(rounds)
        if len(rounds) < MIN_ROUNDS:
            raise ValueError(f"{len(rounds)} rounds are too few to estimate acceptance; record at least {MIN_ROUNDS}")
        drafted = [r for r in rounds if r[0]]
        after_hit = _chances([r for r in drafted if r[3]] or drafted, num_drafts)
        missed = [r for r in drafted if not r[3]]
        ranks = {
            "rejected": [rank for m, k, rank, _ in rounds if k < m],
            "accepted": [rank for m, k, rank, _ in rounds if k == m and m],
            "undrafted": [rank for m, _, rank, _ in rounds if not m],
        }
        everything = _coverage([rank for _, _, rank, _ in rounds])
        curves = {name: _coverage(r) if len(r) >= MIN_ROUNDS else everything for name, r in ranks.items()}
        return cls(
            after_hit=after_hit,
            after_miss=_chances(missed, num_drafts) if len(missed) >= MIN_ROUNDS else after_hit,
            **curves,
            temperature=temperature,
            saguaro=saguaro,
            rounds=len(rounds),
        )


def _chances(rounds: Sequence[Round], num_drafts: int) -> tuple[float, ...]:
    tried, passed = [0] * num_drafts, [0] * num_drafts
    for m, k, _, _ in rounds:
        for j in range(min(k + 1, m)):
            tried[j] += 1
            passed[j] += j < k
    pooled = (sum(passed) + 1) / (sum(tried) + 2)
    return tuple((p + PRIOR_ROUNDS * pooled) / (t + PRIOR_ROUNDS) for p, t in zip(passed, tried))


def _coverage(ranks: Sequence[int | None]) -> tuple[float, ...]:
    counts = [0] * MAX_LEARNED_FAN_OUT
    for rank in ranks:
        if rank is not None and rank < MAX_LEARNED_FAN_OUT:
            counts[rank] += 1
    return tuple(min(1.0, covered / len(ranks)) for covered in accumulate(counts))


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs and acceptance of a target and drafter on one machine; guessed: the inputs that were not measured."""

    target: str
    drafter: str
    costs: Costs
    acceptance: tuple[Acceptance, ...]
    target_devices: int = 1
    drafter_devices: int = 1
    guessed: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    version: int = 1

    def __post_init__(self) -> None:
        if self.version != 1:
            raise ValueError(f"profile version {self.version} is not 1; measure it again")
        if not self.acceptance:
            raise ValueError("a profile needs the acceptance of at least one temperature")
        if min(self.target_devices, self.drafter_devices) < 1:
            raise ValueError("target_devices and drafter_devices must be at least 1")

    def acceptance_at(self, temperature: float) -> Acceptance:
        """Acceptance at the nearest measured temperature, preferably without Saguaro sampling."""
        usual = [a for a in self.acceptance if a.saguaro == 1] or list(self.acceptance)
        return min(usual, key=lambda a: abs(a.temperature - temperature))

    def to_json(self) -> str:
        """The profile as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Parse what `to_json` wrote; ValueError names the invalid field."""
        return msgspec.json.decode(text, type=cls)
