"""Priors for planning without measurements: costs from model shapes and data sheets, acceptance from a scaling law.

`vllm-ssd profile` replaces them with measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from vllm_ssd.planning.predict import Setting, predict_sd, predict_ssd
from vllm_ssd.planning.profile import Acceptance, Costs, Profile

BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY = 0.75, 0.5
"""Shares of a device's peak bandwidth and compute that a forward reaches."""
STEP_S, LAYER_S = 0.7e-3, 1.2e-5
"""Overhead of a forward in seconds, fixed and per layer. With the efficiencies above: 15.7 ms for a 70B target on four
H100 and 1.9 ms for a 1B drafter on one; 15.0 and 2.0 ms were reported (docs/theory.md, Priors)."""
TRAINING_TOKENS = 1.5e13
"""Tokens a model is assumed to be trained on."""
CONTEXT_TOKENS = 1024
"""Context length in tokens: each row reads that much KV cache."""
PARALLEL_DRAFTS = 8
"""Drafts per branch for which a parallel drafter's step costs are guessed."""
DRAFTER_SIZES = (0.03e9, 0.06e9, 0.125e9, 0.25e9, 0.5e9, 1e9, 2e9, 4e9, 8e9)
"""Parameters of the drafters that `drafter_size_prior` compares."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator: peak memory bandwidth in bytes/s, peak compute in FLOP/s at the models' precision."""

    bytes_per_s: float
    flops_per_s: float


DEVICES = {
    "A100": Device(2.0e12, 312e12),
    "B200": Device(8.0e12, 2250e12),
    "H100": Device(3.35e12, 989e12),
    "H200": Device(4.8e12, 989e12),
    "L40S": Device(0.864e12, 362e12),
    "RTX3090": Device(0.936e12, 71e12),
    "RTX4090": Device(1.008e12, 165e12),
}
"""Data sheets, dense bfloat16 (B200: an eighth of a DGX B200's, whose sheet counts sparse operations)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a decoder.

    weights, active: parameters in total and used by one token; kv_per_token: key and value elements per token, over all
    layers; parallel: the model is trained to draw all drafts of a branch in one step, from mask tokens; experts,
    experts_per_token: per layer, 0 for a dense model. Raises ValueError unless experts_per_token is below experts.
    """

    weights: float
    active: float
    layers: int
    kv_per_token: float = 0.0
    bytes_per_weight: float = 2.0
    parallel: bool = False
    experts: int = 0
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        if self.experts and not 0 < self.experts_per_token < self.experts:
            raise ValueError(
                f"experts_per_token must be from 1 to {self.experts - 1} with {self.experts} experts, got "
                f"{self.experts_per_token}"
            )

    def read(self, tokens: float) -> float:
        """Number of parameters that one forward over `tokens` tokens reads.

        A mixture of experts reads everything outside the experts, plus every expert that any token is routed to.
        """
        if not self.experts:
            return min(self.weights, self.active * tokens)
        expert = (self.weights - self.active) / (self.experts - self.experts_per_token)
        others = self.active - self.experts_per_token * expert
        return others + expert * distinct_experts(self.experts, self.experts_per_token, tokens)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Size of a dense or mixture-of-experts decoder, from its config.json; raises ValueError for other models."""
        parallel = any(config.get(key) is not None for key in ("pard_token", "ptd_token_id"))
        config = config.get("text_config", config)
        try:
            hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
            inner, vocab = config["intermediate_size"], config["vocab_size"]
        except KeyError as error:
            raise ValueError(f"config.json has no {error}: only Llama-like decoders are supported") from None
        head = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        attention = hidden * head * (2 * heads + 2 * kv_heads)
        experts = config.get("num_experts") or config.get("num_local_experts") or 1
        used = config.get("num_experts_per_tok") or 1
        mlp = 3 * hidden * (config.get("moe_intermediate_size") or inner if experts > 1 else inner)
        tables = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return cls(
            weights=layers * (attention + experts * mlp) + tables,
            active=layers * (attention + used * mlp) + vocab * hidden,
            layers=layers,
            kv_per_token=2 * layers * kv_heads * head,
            parallel=parallel,
            experts=experts if experts > used else 0,
            experts_per_token=used if experts > used else 0,
        )

    @classmethod
    def of_size(cls, parameters: float) -> Shape:
        """A dense decoder of `parameters` with typical proportions (16 layers at 1e9, 80 at 70e9)."""
        return cls(parameters, parameters, max(2, round(16 * (parameters / 1e9) ** 0.38)))


def distinct_experts(experts: int, per_token: int, tokens: float) -> float:
    """Expected number of distinct experts per layer if each of `tokens` tokens uses a random `per_token` of them.

    An upper bound: neighbouring tokens of a text share more experts than random choices would.
    """
    return experts * (1 - (1 - per_token / experts) ** tokens)


def forward_s(
    shape: Shape, device: Device, count: int, tokens: float, rows: float, context: float = CONTEXT_TOKENS
) -> float:
    """Roofline time in seconds of one forward over `tokens` tokens of `rows` requests on `count` devices.

    context: tokens whose keys and values each row reads.
    """
    num_bytes = shape.bytes_per_weight * (shape.read(tokens) + rows * context * shape.kv_per_token)
    memory_s = num_bytes / (BANDWIDTH_EFFICIENCY * device.bytes_per_s * count)
    compute_s = 2 * shape.active * tokens / (COMPUTE_EFFICIENCY * device.flops_per_s * count)
    return STEP_S + LAYER_S * shape.layers + max(memory_s, compute_s)


def guess_costs(
    target: Shape, drafter: Shape, device: Device, target_devices: int, rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
) -> Costs:
    """Costs of a target on `target_devices` devices and a drafter on one more."""
    verify = [(b, m, forward_s(target, device, target_devices, b * m, b)) for b in rows for m in (1, 2, 4, 8, 16)]
    # The drafter's KV reads are negligible, as all branches of a request read their trunk once.
    drafts = PARALLEL_DRAFTS if drafter.parallel else 1
    step = [(float(n), forward_s(drafter, device, 1, n * drafts, 0)) for n in (1, 16, 64, 256, 1024, 4096)]
    parallel = drafts if drafter.parallel else 0
    return Costs(tuple(verify), tuple(step), handover_s=2e-4, latency_s=2e-4, parallel=parallel)


def perplexity(parameters: float, training_tokens: float = TRAINING_TOKENS) -> float:
    """Perplexity by Chinchilla's fit of the loss (Hoffmann et al. 2022, equation 10)."""
    return exp(1.69 + 406.4 / parameters**0.34 + 410.7 / training_tokens**0.28)


def guess_acceptance(drafter_parameters: float, target_parameters: float) -> float:
    """Acceptance rate, linear in both perplexities (arXiv 2603.11053, cited second-hand; R^2 = 0.6, one benchmark)."""
    return -0.0067 * perplexity(drafter_parameters) + 0.0130 * perplexity(target_parameters) + 0.642


def guess_profile(
    target: Shape, drafter: Shape, device: Device, target_devices: int, acceptance: float | None
) -> Profile:
    """Build a profile without measurements; acceptance: rate per draft (default: from the scaling law)."""
    guessed = ["costs, from shapes and data sheets"]
    if acceptance is None:
        acceptance = guess_acceptance(drafter.weights, target.weights)
        guessed.append("acceptance, from a law over model sizes")
    guessed.append("how well candidates cover the bonus token")
    costs = guess_costs(target, drafter, device, target_devices)
    return Profile(
        "target", "drafter", costs, (Acceptance.prior(acceptance),), target_devices, 1, guessed=tuple(guessed)
    )


def drafter_size_prior(target: Shape, device: Device, target_devices: int, batch_size: int = 1) -> dict[str, float]:
    """Drafter size in parameters with the highest predicted rate, for stock speculation ("sd") and SSD ("ssd").

    SSD hides drafting behind verification, so it can afford a larger drafter if rounds are long enough.
    """
    best = {"sd": (0.0, 0.0), "ssd": (0.0, 0.0)}
    for size in DRAFTER_SIZES:
        if size > target.weights / 2:
            break
        profile = guess_profile(target, Shape.of_size(size), device, target_devices, None)
        acceptance = profile.acceptance[0]
        for k in range(1, 9):
            stock = predict_sd(profile, acceptance, batch_size, k).tokens_per_s
            hidden = predict_ssd(profile, acceptance, Setting(batch_size, k, 4 * (k + 1), "skip")).tokens_per_s
            best = {"sd": max(best["sd"], (stock, size)), "ssd": max(best["ssd"], (hidden, size))}
    return {method: size for method, (_, size) in best.items()}
