"""Choosing a configuration: the best setting of each method, and whether a second device pays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import erf, log, sqrt

from vllm_ssd.planning.predict import Fallback, Prediction, Setting, predict_plain, predict_sd, predict_ssd
from vllm_ssd.planning.profile import Acceptance, Profile

BRANCHES_PER_LENGTH = (1, 2, 4, 8)
"""Branch budgets to compare, per accept length."""
MIN_GAIN = 0.02
"""Relative gain in tokens per second that justifies a costlier setting (more drafters, waiting, drafts or branches)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Predictions for one batch size and temperature.

    grid: SSD at every K and branch budget, each with its best fallback; recommended: highest tokens per second;
    recommended_per_device: highest tokens per second per device; draft_share: share of stock speculation's best round
    that is spent drafting; break_even_share: draft_share from which SSD is faster per device, if it hides all drafting;
    confidence: chance that `recommended` beats the best other method; saguaro: C of the acceptance used.
    """

    plain: Prediction
    sd: Prediction
    ssd: Prediction
    grid: tuple[Prediction, ...]
    recommended: Prediction
    recommended_per_device: Prediction
    draft_share: float
    break_even_share: float
    confidence: float
    temperature: float
    saguaro: float

    @property
    def second_device_pays(self) -> bool:
        """Whether SSD yields more tokens per second per device than plain decoding and stock speculation."""
        return self.recommended_per_device.method == "ssd"


def plan(
    profile: Profile,
    batch_size: int = 1,
    temperature: float = 0.0,
    drafts: Iterable[int] = range(1, 9),
    budgets: Sequence[int] = (),
    fallbacks: Sequence[Fallback] = ("auto",),
    drafters: Sequence[int] = (1,),
    padded: bool = False,
) -> Plan:
    """Predict plain decoding, stock speculation and SSD at all settings, and pick the best of each.

    drafts: values of K; budgets: branches per request (default: 1, 2, 4 and 8 per accept length); drafters: numbers of
    drafters; padded: as in `Setting`.
    """
    drafts = list(drafts)
    acceptance = profile.acceptance_at(temperature)
    plain = predict_plain(profile, batch_size)
    sd = _best(predict_sd(profile, acceptance, batch_size, k) for k in drafts)
    same = [a for a in profile.acceptance if a.temperature == acceptance.temperature]
    grids = {a.saguaro: _grid(profile, a, batch_size, drafts, budgets, fallbacks, drafters, padded) for a in same}
    saguaro = max(sorted(grids, reverse=True), key=lambda c: _best(grids[c]).tokens_per_s)
    grid = grids[saguaro]
    ssd = _best(grid)
    methods = sorted((plain, sd, ssd), key=lambda p: p.tokens_per_s)
    extra = profile.drafter_devices * ssd.num_drafters
    share = extra / (profile.target_devices + extra) / (ssd.hit_rate or 1.0)
    return Plan(
        plain=plain,
        sd=sd,
        ssd=ssd,
        grid=tuple(grid),
        recommended=methods[-1],
        recommended_per_device=max((plain, sd, _best(grid, per_device=True)), key=lambda p: p.per_device),
        draft_share=sd.num_drafts * profile.costs.sync_step_s(batch_size) / sd.round_s,
        break_even_share=min(share, 1.0),
        confidence=chance_of_more(methods[-1], methods[-2]),
        temperature=acceptance.temperature,
        saguaro=saguaro,
    )


def chance_of_more(a: Prediction, b: Prediction) -> float:
    """Chance that `a` is faster than `b`, given independent errors."""
    scatter = sqrt(a.relative_error**2 + b.relative_error**2) or 1e-9
    return 0.5 + 0.5 * erf(log(a.tokens_per_s / b.tokens_per_s) / scatter / sqrt(2))


def _grid(
    profile: Profile,
    acceptance: Acceptance,
    batch_size: int,
    drafts: Sequence[int],
    budgets: Sequence[int],
    fallbacks: Sequence[Fallback],
    drafters: Sequence[int],
    padded: bool,
) -> list[Prediction]:
    found = []
    for k, n in product(drafts, drafters):
        for budget in budgets or [count * (k + 1) for count in BRANCHES_PER_LENGTH]:
            settings = (Setting(batch_size, k, budget, on_miss, n, padded=padded) for on_miss in fallbacks)
            found.append(_best(predict_ssd(profile, acceptance, setting) for setting in settings))
    return found


def _best(predictions: Iterable[Prediction], per_device: bool = False) -> Prediction:
    """The cheapest of the predictions within 2 % of the fastest."""
    predictions = list(predictions)

    def rate(p: Prediction) -> float:
        return p.per_device if per_device else p.tokens_per_s

    enough = max(map(rate, predictions)) / (1 + MIN_GAIN)

    def cost(p: Prediction) -> tuple[int, bool, float, float]:
        return p.num_drafters, p.on_miss not in (None, "skip"), p.drafts_per_round + p.branch_budget / 32, -rate(p)

    return min((p for p in predictions if rate(p) >= enough), key=cost)
