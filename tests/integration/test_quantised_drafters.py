"""A draft model in int8, as compressed-tensors writes it: drafts are accepted, and text is the target's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from altered_models import altered
from engines import PAIR, Engine, assert_conclusive, request, texts

INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": INT8_ACTIVATIONS}},
}


def with_8_bits(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of linear layers, [N, K], as int8, with a scale for each output."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            found[name] = (weight.float() / scale).round().to(torch.int8)
            found[f"{name}_scale"] = scale
        else:
            found[name] = weight
    return found


def test_a_quantised_model_drafts(
    start_engine: Callable[..., Engine],
    target_alone: Engine,
    prompts: Callable[..., list[list[int]]],
    tmp_path: Path,
) -> None:
    drafter = altered(PAIR / "drafter", tmp_path / "drafter", with_8_bits, quantization_config=QUANTISATION)
    engine = start_engine(speculative={"model": str(drafter), "branch_budget": 12, "on_miss": "skip"})
    requests = [request(prompt, max_tokens=40) for prompt in prompts(6, 5, 60, seed=5)]
    run = engine.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate(requests))
    assert_conclusive(run, hits=10, accepted=40)
    engine.close()
