"""Guesses for what was not measured: costs from model shapes and device numbers, acceptance and size from laws.

Everything here is a prior, for planning before a machine is at hand. `vllm-ssd profile` replaces it by measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from vllm_ssd.planning.predict import Setting, predict_sd, predict_ssd
from vllm_ssd.planning.profile import Acceptance, Costs, Profile

BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY = 0.75, 0.5
STEP_S, LAYER_S = 0.7e-3, 1.2e-5
"""Time of a forward that no byte or operation explains. With the efficiencies they give 15.7 ms for a 70B target on
four H100 and 1.9 ms for a 1B drafter on one; 15.0 and 2.0 were reported (docs/theory.md, Priors)."""
TRAINING_TOKENS = 1.5e13
CONTEXT_TOKENS = 1024
SIZES = (0.03e9, 0.06e9, 0.125e9, 0.25e9, 0.5e9, 1e9, 2e9, 4e9, 8e9)


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator: bytes a second from its memory, operations a second at the models' precision."""

    bytes_per_s: float
    flops_per_s: float


DEVICES = {
    "A100": Device(2.0e12, 312e12),
    "H100": Device(3.35e12, 989e12),
    "H200": Device(4.8e12, 989e12),
    "L40S": Device(0.864e12, 362e12),
    "RTX3090": Device(0.936e12, 71e12),
    "RTX4090": Device(1.008e12, 165e12),
}
"""Data sheets, dense bfloat16."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder costs to run. weights, active: parameters in all, and those that one token uses; kv_per_token:
    key and value elements of one token in all layers."""

    weights: float
    active: float
    layers: int
    kv_per_token: float = 0.0
    bytes_per_weight: float = 2.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Count the parameters of a dense or mixture-of-experts decoder from its Hugging Face config.json."""
        config = config.get("text_config", config)
        try:
            hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
            inner, vocab = config["intermediate_size"], config["vocab_size"]
        except KeyError as error:
            raise ValueError(
                f"the model's config.json has no {error}; only decoders of the usual shape can be sized"
            ) from None
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
        )

    @classmethod
    def of_size(cls, parameters: float) -> Shape:
        """A dense decoder of usual proportions (16 layers at 1e9 parameters, 80 at 70e9)."""
        return cls(parameters, parameters, max(2, round(16 * (parameters / 1e9) ** 0.38)))


def forward_s(shape: Shape, device: Device, count: int, tokens: float, rows: float) -> float:
    """Roofline of one forward over `tokens` tokens of `rows` requests on `count` devices."""
    # Tokens beyond the first make a mixture read more of its experts, at most all.
    read = min(shape.weights, shape.active * tokens) if shape.active < shape.weights else shape.weights
    num_bytes = shape.bytes_per_weight * (read + rows * CONTEXT_TOKENS * shape.kv_per_token)
    memory_s = num_bytes / (BANDWIDTH_EFFICIENCY * device.bytes_per_s * count)
    compute_s = 2 * shape.active * tokens / (COMPUTE_EFFICIENCY * device.flops_per_s * count)
    return STEP_S + LAYER_S * shape.layers + max(memory_s, compute_s)


def guess_costs(
    target: Shape, drafter: Shape, device: Device, target_devices: int, rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
) -> Costs:
    """Costs of a target on `target_devices` devices and of a drafter on one more of them."""
    verify = [(b, m, forward_s(target, device, target_devices, b * m, b)) for b in rows for m in (1, 2, 4, 8, 16)]
    # Branches of a request share its trunk's KV: read once, it is left out.
    step = [(float(n), forward_s(drafter, device, 1, n, 0)) for n in (1, 16, 64, 256, 1024, 4096)]
    return Costs(tuple(verify), tuple(step), handover_s=2e-4, latency_s=2e-4)


def perplexity(parameters: float, training_tokens: float = TRAINING_TOKENS) -> float:
    """Chinchilla's fit of the loss (Hoffmann et al. 2022, equation 10)."""
    return exp(1.69 + 406.4 / parameters**0.34 + 410.7 / training_tokens**0.28)


def guess_acceptance(drafter_parameters: float, target_parameters: float) -> float:
    """Linear law over both perplexities (arXiv 2603.11053, second-hand; R^2 = 0.6, one benchmark)."""
    return -0.0067 * perplexity(drafter_parameters) + 0.0130 * perplexity(target_parameters) + 0.642


def sdsl_drafter_size(target_parameters: float) -> float:
    """Parameters of the best drafter for stock speculation, counted in operations (the same paper's fit)."""
    return 2.71e-3 * target_parameters + 8.71e7


def guess_profile(
    target: Shape, drafter: Shape, device: Device, target_devices: int, acceptance: float | None
) -> Profile:
    """A profile of guesses; acceptance: per draft, or None for the law's."""
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
    """Parameters of the drafter with the best predicted rate, for stock speculation ("sd") and for SSD ("ssd").

    Hidden drafting makes a dearer drafter affordable: the second is the larger one where a round has time for it.
    """
    best = {"sd": (0.0, 0.0), "ssd": (0.0, 0.0)}
    for size in SIZES:
        if size > target.weights / 2:
            break
        profile = guess_profile(target, Shape.of_size(size), device, target_devices, None)
        acceptance = profile.acceptance[0]
        for k in range(1, 9):
            stock = predict_sd(profile, acceptance, batch_size, k).tokens_per_s
            hidden = predict_ssd(profile, acceptance, Setting(batch_size, k, 4 * (k + 1), "skip")).tokens_per_s
            best = {"sd": max(best["sd"], (stock, size)), "ssd": max(best["ssd"], (hidden, size))}
    return {method: size for method, (_, size) in best.items()}
