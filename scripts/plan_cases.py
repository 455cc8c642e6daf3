"""The inputs of plan_table.py: targets, drafters, how long they take, what is accepted, and what was published.

Every number says where it is from: measured (docs/benchmarks.md, On a GPU), published (docs/theory.md, Published
numbers), or assumed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_ssd.planning import DEVICES, Acceptance, Costs, Profile, Shape
from vllm_ssd.planning.eagle import head_shape, with_head
from vllm_ssd.planning.prior import PARALLEL_DRAFTS, forward_s
from vllm_ssd.planning.published import (
    ACCEPTANCE_AFTER_MISS,
    SD_STEP_S,
    VERIFY_MS,
    published_profile,
    published_sd_acceptance,
)
from vllm_ssd.policy import MAX_LEARNED_FAN_OUT
from vllm_ssd.policy.curve import Point, interpolate

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_check_h100.json"
BATCHES = (1, 4, 16, 64)
ROWS = (1, 2, 4, 8, 16, 32, 64)
SHORT_CONTEXT = 64
"""Tokens of context of the measured verifications."""


def _config(vocab: int, hidden: int, columns: int, layers: int, heads: int, head_size: int, tied: bool = False) -> dict:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": columns,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_size,
        "tie_word_embeddings": tied,
    }


QWEN3_8B = _config(151936, 4096, 12288, 36, 32, 128)
QWEN3_32B = _config(151936, 5120, 25600, 64, 64, 128)
LLAMA_8B = _config(128256, 4096, 14336, 32, 32, 128)
LLAMA_70B = _config(128256, 8192, 28672, 80, 64, 128)
MIXTURE = _config(128256, 6144, 16384, 60, 64, 128)
QWEN3_06B = _config(151936, 1024, 3072, 28, 16, 128, tied=True)
LLAMA_1B = _config(128256, 2048, 8192, 16, 32, 64, tied=True)


def accepted_of(tokens: float, num_drafts: int) -> float:
    """The independent acceptance rate at which a round of `num_drafts` drafts emits `tokens` tokens."""
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        low, high = (rate, high) if sum(rate**j for j in range(num_drafts + 1)) < tokens else (low, rate)
    return low


def coverage(first: float, r: float) -> tuple[float, ...]:
    """Chance that t* is among the first F candidates, a Pareto law."""
    return tuple(1 - (1 - first) * f**-r for f in range(1, MAX_LEARNED_FAN_OUT + 1))


RATE_32B = accepted_of(141.4 * (11.45e-3 + 6 * 1.9e-3), 6)
"""Of Qwen3-32B and 0.6B: 141.4 tok/s of stock speculation at K = 6, a verification of 11.45 ms (both published), and
draft steps of 1.9 ms (measured)."""
COVERAGE_32B = coverage(0.44, 0.70)
"""A power law through the published hit rates of that pair, 0.74 with three candidates and 0.84 with six."""
RATE_MIXTURE = 0.8
"""Assumed: between the two published pairs."""
EAGLE_LOW = accepted_of(2.68, 7)
"""2.68 tokens a round of EAGLE-3 with fresh features, published; K = 7 is assumed."""
EAGLE_OF_DRAFTER = accepted_of(3.71, 7) / ACCEPTANCE_AFTER_MISS
"""3.71 tokens a round after a miss, of EAGLE-3 on 70B, against 4.01 of the 1B drafter: published; K = 7 is assumed. So
much of a draft model's acceptance rate is taken for the better case of EAGLE-3."""
PARD_DECAY = 0.98
"""Assumed: the acceptance of a draft drawn in parallel, over that of the draft before it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A target and its drafter. factors: seconds of a round over the roofline's, by batch size, on any device."""

    name: str
    shape: Shape
    head: Shape
    drafter: str
    ssd: Acceptance
    stock: Acceptance
    factors: tuple[Point, ...] = ((1.0, 1.0),)

    @property
    def eagle_rates(self) -> tuple[float, float]:
        """A low and a high acceptance rate of an EAGLE-3 head."""
        return EAGLE_LOW, EAGLE_OF_DRAFTER * self.stock.after_hit[0]


def measured_rounds() -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """(batch size, ms of a verification of 6 tokens a row) of 8B, (branches, ms of a step) of 0.6B, on an H100."""
    rows = json.loads(RESULTS.read_text())["parts"][0]["rows"]
    rounds = tuple((float(r["batch"]), r["value"]) for r in rows if r["kind"] == "verify" and r["tokens"] == 6)
    steps = tuple((float(r["branches"]), r["value"]) for r in rows if r["kind"] == "draft_step")
    return rounds, steps


H100 = DEVICES["H100"]
SHAPE_8B, SHAPE_32B, SHAPE_70B = (Shape.from_config(config) for config in (QWEN3_8B, QWEN3_32B, LLAMA_70B))
DRAFTERS = {"0.6B": Shape.from_config(QWEN3_06B), "1B": Shape.from_config(LLAMA_1B)}
MEASURED_8B, MEASURED_06B = measured_rounds()


def roofline_ms(kind: str, x: float) -> float:
    """The roofline's duration of one measured or published forward."""
    if kind == "8B":
        return 1e3 * forward_s(SHAPE_8B, H100, 1, 6 * x, x, SHORT_CONTEXT)
    if kind == "32B":
        return 1e3 * forward_s(SHAPE_32B, H100, 4, 5 * x, x)
    if kind == "70B":
        return 1e3 * forward_s(SHAPE_70B, H100, 4, 8 * x, x)
    return 1e3 * forward_s(DRAFTERS[kind], H100, 1, x, 0)


KNOWN: dict[str, tuple[Point, ...]] = {
    "8B": MEASURED_8B,
    "32B": ((1.0, 11.45),),
    "70B": tuple((float(b), ms) for b, ms in VERIFY_MS.items()),
    "0.6B": MEASURED_06B,
    "1B": ((1.0, 1e3 * SD_STEP_S),),
}
"""Measured or published forwards on H100 by batch size or branches, in ms: rounds of 8B on one device (6 tokens a row,
measured), of 32B (5 tokens a row) and 70B (8) on four (published), steps of 0.6B (measured) and 1B (published)."""


def factors(kind: str) -> tuple[Point, ...]:
    """Known durations over the roofline's; the first and the last one hold beyond them."""
    found = tuple((x, ms / roofline_ms(kind, x)) for x, ms in KNOWN[kind])
    return (*found, (found[-1][0] + 1, found[-1][1]))  # level beyond the last one


def _independent(rate: float, curve: tuple[float, ...]) -> Acceptance:
    return Acceptance((rate,), (rate,), curve, curve, curve)


def targets() -> dict[str, Target]:
    """All targets by a short name."""
    like_32b, like_mixture = _independent(RATE_32B, COVERAGE_32B), _independent(RATE_MIXTURE, COVERAGE_32B)
    published = published_profile().acceptance[0]
    fine = Shape(400e9, 17e9, 60, SHAPE_70B.kv_per_token * 0.75, 1.0, experts=256, experts_per_token=8)
    coarse = replace(fine, experts=128, experts_per_token=1)
    head = head_shape(MIXTURE)
    return {
        "8B": Target("8B", SHAPE_8B, head_shape(QWEN3_8B), "0.6B", like_32b, like_32b, factors("8B")),
        "32B": Target("32B", SHAPE_32B, head_shape(QWEN3_32B), "0.6B", like_32b, like_32b, factors("32B")),
        "70B": Target(
            "70B", SHAPE_70B, head_shape(LLAMA_70B), "1B", published, published_sd_acceptance(), factors("70B")
        ),
        "400B, 8 of 256": Target("400B, 8 of 256 experts", fine, head, "1B", like_mixture, like_mixture),
        "400B, 1 of 128": Target("400B, 1 of 128 experts", coarse, head, "1B", like_mixture, like_mixture),
    }


def costs(target: Target, device_name: str, count: int, parallel: bool = False) -> Costs:
    """Costs of a target on `count` devices with its drafter on one more, which draws all drafts in one step or not."""
    device, drafter = DEVICES[device_name], DRAFTERS[target.drafter]
    slower = factors(target.drafter)
    verify = tuple(
        (b, m, interpolate(target.factors, b) * forward_s(target.shape, device, count, b * m, b))
        for b in ROWS
        for m in (1, 2, 4, 8, 16)
    )

    def step_s(tokens: float) -> float:
        return interpolate(slower, tokens) * forward_s(drafter, device, 1, tokens, 0)

    drafts = PARALLEL_DRAFTS if parallel else 1
    sizes = (1, 8, 24, 64, 96, 192, 512, 1024, 2048, 4096)
    return Costs(
        verify,
        tuple((float(n), step_s(n * drafts)) for n in sizes),
        sync_step=tuple((float(b), step_s(b)) for b in ROWS),
        handover_s=2e-4,
        latency_s=2e-4,
        parallel=drafts if parallel else 0,
    )


def profile(target: Target, device: str, count: int, parallel: bool = False) -> Profile:
    """The profile of SSD on `count` + 1 devices."""
    acceptance = target.ssd
    if parallel:
        rates = [*acceptance.after_hit, *[acceptance.after_hit[-1]] * 16][:16]
        chances = tuple(rate * PARD_DECAY**j for j, rate in enumerate(rates))
        acceptance = replace(acceptance, after_hit=chances, after_miss=chances)
    return Profile(
        target.name, target.drafter, costs(target, device, count, parallel), (acceptance,), count, guessed=("costs",)
    )


def eagle_profile(target: Target, device: str, count: int, rate: float) -> Profile:
    """The profile of an EAGLE-3 head on the target's `count` devices, with an acceptance rate a draft."""
    found = profile(target, device, count)
    with_steps = with_head(found.costs, target.head, DEVICES[device], count, ROWS)
    return replace(found, costs=with_steps, acceptance=(_independent(rate, COVERAGE_32B),))


@dataclass(frozen=True, slots=True)
class Published:
    """A published number. method: as in the table; drafts: its K; source: who measured it."""

    target: str
    batch: int
    method: str
    drafts: int
    tokens_per_s: float
    source: str


INDEPENDENT, PAPER = "independent run", "SSD paper, second-hand"
PUBLISHED: Sequence[Published] = (
    Published("32B", 1, "plain", 0, 97.4, INDEPENDENT),
    Published("32B", 1, "plain", 0, 88.8, PAPER),
    Published("32B", 1, "draft_model", 6, 141.4, INDEPENDENT),
    Published("32B", 1, "draft_model", 4, 136.8, PAPER),
    Published("32B", 1, "SSD", 4, 210.9, INDEPENDENT),
    Published("32B", 1, "SSD", 4, 203.8, PAPER),
    Published("70B", 1, "plain", 0, 67.0, INDEPENDENT),
    Published("70B", 1, "plain", 0, 54.7, PAPER),
    Published("70B", 1, "draft_model", 6, 182.0, INDEPENDENT),
    Published("70B", 1, "draft_model", 6, 161.8, PAPER),
    Published("70B", 1, "SSD", 7, 286.0, INDEPENDENT),
    Published("70B", 1, "SSD", 7, 255.8, PAPER),
    Published("70B", 4, "SSD", 7, 872.0, INDEPENDENT),
    Published("70B", 16, "SSD", 7, 1979.0, INDEPENDENT),
)
"""On four H100, SSD on one more; greedy. SSD there asks its drafter and waits. Values of the paper are means over its
data sets."""
