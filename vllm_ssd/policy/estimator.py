"""Expected tokens and duration of a round, by the number of drafts it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_ssd.policy.curve import interpolate

MEMORY_ROUNDS = 256
"""Rounds after which the weight of an observation has decayed to 1 / e."""
MAX_WEIGHT = 1e9
"""Weight of the newest round at which all sums are divided by it, to prevent overflow."""
FORGOTTEN_ROUNDS = 1e-6
"""Decayed rounds below which an arm counts as never measured, to prevent underflow."""

PRIOR_ACCEPTANCE = 0.5
"""Acceptance rate of the first draft before data; later positions inherit the previous one until they have data."""
PRIOR_TRIES = 4.0
"""Prior weight, in tries, of the acceptance rate that a position inherits."""
PRIOR_CARRIED = 64.0
"""Prior weight, in row-rounds, of other arms' draft counts."""
PRIOR_ROWS = 512.0
"""Prior weight, in row-rounds, of the tokens predicted from all arms against those that an arm itself emitted."""

MIN_EXTRAPOLATED = 0.5
"""Lower bound on the predicted duration of a round narrower than every measured arm, relative to the narrowest arm."""


@dataclass(slots=True)
class RoundSums:
    """Weighted sums over rounds: rounds, rows, tokens emitted, duration in seconds."""

    rounds: float = 0.0
    rows: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, weight: float, rows: int, tokens: int, seconds: float) -> None:
        """Count one round."""
        self.rounds += weight
        self.rows += weight * rows
        self.tokens += weight * tokens
        self.seconds += weight * seconds


class Arm(RoundSums):
    """Sums over rounds that asked for the same number of drafts.

    `carried[j]`, `accepted[j]` [max_drafts]: rows that carried, or accepted, more than j drafts; `rejected[j]`: rows
    that accepted j drafts and rejected the next.
    """

    __slots__ = ("carried", "accepted", "rejected")

    def __init__(self, max_drafts: int) -> None:
        super().__init__()
        self.carried, self.accepted, self.rejected = ([0.0] * max_drafts for _ in range(3))

    def add_drafts(self, weight: float, offered: Sequence[int], accepted: Sequence[int]) -> None:
        """Count the drafts offered and accepted per row of one round, both [B]."""
        for drafts, k in zip(offered, accepted):
            for j in range(drafts):
                self.carried[j] += weight
            for j in range(k):
                self.accepted[j] += weight
            if k < drafts:
                self.rejected[k] += weight

    def scale(self, factor: float) -> None:
        """Multiply all sums."""
        self.rounds, self.rows = factor * self.rounds, factor * self.rows
        self.tokens, self.seconds = factor * self.tokens, factor * self.seconds
        for sums in (self.carried, self.accepted, self.rejected):
            sums[:] = [factor * value for value in sums]

    @property
    def width(self) -> float:
        """Tokens in the target's forward, summed over rounds."""
        return self.rows + sum(self.carried)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predictions for a round of the whole batch, by number of drafts; every field is [max_drafts + 1].

    tokens, seconds: expected; evidence: decayed rounds measured with exactly this number of drafts; measured_s: their
    mean duration in seconds, 0 without any.
    """

    tokens: Sequence[float]
    seconds: Sequence[float]
    evidence: Sequence[float]
    measured_s: Sequence[float]

    @property
    def rates(self) -> list[float]:
        """Tokens per second."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds)]


class RoundEstimator:
    """Learns acceptance rates by draft position and round time by tokens in the forward; older rounds decay.

    Acceptance depends on the text, and one probe sees only a short stretch of it, so acceptance is pooled over all
    arms. How many drafts a row carries and how long a round takes are learned per arm.
    """

    def __init__(self, max_drafts: int) -> None:
        self._arms = [Arm(max_drafts) for _ in range(max_drafts + 1)]
        # The weight of the newest round: it grows, so that older rounds decay without being touched.
        self._weight = 1.0
        # (tokens in the target's forward, seconds), the mean of each measured arm, sorted.
        self._curve: list[tuple[float, float]] = []

    def observe(self, num_drafts: int, offered: Sequence[int], accepted: Sequence[int], seconds: float) -> None:
        """Learn from a round that asked for `num_drafts` and took `seconds`; offered, accepted [B]: drafts per row."""
        self._weight *= 1 + 1 / MEMORY_ROUNDS
        arm = self._arms[num_drafts]
        arm.add(self._weight, len(offered), len(offered) + sum(accepted), seconds)
        arm.add_drafts(self._weight, offered, accepted)
        if self._weight > MAX_WEIGHT:
            self._rescale()

    def discount(self, factor: float) -> None:
        """Divide the weight of everything learned so far by `factor`, relative to future rounds."""
        self._weight *= factor

    def refit(self) -> None:
        """Update the curve that `round_seconds` and `draft_seconds` read."""
        measured = [arm for arm in self._arms if arm.rounds]
        self._curve = sorted((arm.width / arm.rounds, arm.seconds / arm.rounds) for arm in measured)

    def round_seconds(self, num_tokens: float) -> float | None:
        """Expected seconds of a round with `num_tokens` in the target's forward; None before the first fit."""
        return interpolate(self._curve, num_tokens, MIN_EXTRAPOLATED) if self._curve else None

    def draft_seconds(self) -> float:
        """Seconds that one more draft adds to a round: slope from the narrowest to the widest arm; 0 with one arm."""
        if len(self._curve) < 2:
            return 0.0
        (x0, y0), (x1, y1) = self._curve[0], self._curve[-1]
        return max(y1 - y0, 0.0) / (x1 - x0) if x1 > x0 else 0.0

    def tokens_per_row(self, num_drafts: int) -> float | None:
        """Mean tokens emitted per row in rounds of `num_drafts`; None if none was measured."""
        arm = self._arms[num_drafts]
        return arm.tokens / arm.rows if arm.rows else None

    def predict(self) -> Prediction:
        """Refit, then predict tokens and duration at every number of drafts; needs at least one observed round.

        With R(j) the share of an arm's rows that carry at least j drafts and S(j) the survival of draft j, a row is
        expected to emit 1 + sum of R(j) S(j) tokens (docs/theory.md, Adaptation). As an arm's own rows accumulate,
        their mean replaces that value.
        """
        self.refit()
        arms, prior_carried, prior_rows = self._arms, PRIOR_CARRIED * self._weight, PRIOR_ROWS * self._weight
        batch_size = sum(arm.rows for arm in arms) / sum(arm.rounds for arm in arms)
        carried, survival = self.carried(), self.survival()
        tokens, seconds = [], []
        for k, arm in enumerate(arms):
            own = [(arm.carried[j] + prior_carried * carried[j]) / (arm.rows + prior_carried) for j in range(k)]
            expected = 1 + sum(c * s for c, s in zip(own, survival))
            tokens.append(batch_size * (arm.tokens + prior_rows * expected) / (arm.rows + prior_rows))
            seconds.append(interpolate(self._curve, batch_size * (1 + sum(own)), MIN_EXTRAPOLATED))
        return Prediction(
            tokens,
            seconds,
            evidence=[arm.rounds / self._weight for arm in arms],
            measured_s=[arm.seconds / arm.rounds if arm.rounds else 0.0 for arm in arms],
        )

    def carried(self) -> list[float]:
        """Chance that a row carries draft 1, 2, … max_drafts, pooled over the arms that ask for it."""
        chance, chances = 1.0, []
        for j in range(len(self._arms) - 1):
            able = self._arms[j + 1 :]
            rows = sum(arm.rows for arm in able) + self._weight
            chance = (sum(arm.carried[j] for arm in able) + self._weight * chance) / rows
            chances.append(chance)
        return chances

    def survival(self) -> list[float]:
        """Chance that draft 1, 2, … max_drafts and all before it are accepted, pooled over arms."""
        prior_tries = PRIOR_TRIES * self._weight
        acceptance, surviving, survival = PRIOR_ACCEPTANCE, 1.0, []
        for j in range(len(self._arms) - 1):
            accepted = sum(arm.accepted[j] for arm in self._arms)
            tried = accepted + sum(arm.rejected[j] for arm in self._arms)
            acceptance = (accepted + prior_tries * acceptance) / (tried + prior_tries)
            surviving *= acceptance
            survival.append(surviving)
        return survival

    def _rescale(self) -> None:
        factor, self._weight = 1 / self._weight, 1.0
        for k, arm in enumerate(self._arms):
            arm.scale(factor)
            if arm.rounds <= FORGOTTEN_ROUNDS:
                self._arms[k] = Arm(len(self._arms) - 1)
