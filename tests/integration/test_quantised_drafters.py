"""A draft model in int8 or int4, as compressed-tensors writes it: drafts are accepted, and text is the target's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from altered_models import altered
from engines import PAIR, Engine, assert_conclusive, request, texts

GROUP = 32
"""Weights along k that share a scale in int4."""
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False}


def quantisation(form: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers, but for the last, are quantised."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }


def in_8_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N, K] as int8, with a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def in_4_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N, K] as int32 [N, K / 8] of eight values each, the first in the lowest bits, with a scale for each group."""
    groups = weight.view(len(weight), -1, GROUP)
    scale = groups.abs().amax(2) / 7
    values = (groups / scale[..., None]).round().to(torch.int64).view(len(weight), -1, 8) + 8
    packed = (values << (4 * torch.arange(8))).sum(2)
    return {
        "weight_packed": packed.to(torch.uint32).view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def linear_layers(
    quantise: Callable[[torch.Tensor], dict[str, torch.Tensor]], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The model's tensors, those of linear layers quantised."""
    found = {}
    for name, weight in weights.items():
        layer, is_linear, _ = name.partition("_proj.weight")
        if is_linear:
            found |= {f"{layer}_proj.{part}": tensor for part, tensor in quantise(weight.float()).items()}
        else:
            found[name] = weight
    return found


@pytest.mark.parametrize(
    "quantise, config, dtype",
    [
        pytest.param(in_8_bits, quantisation("int-quantized", INT8, ACTIVATIONS), "float32", id="W8A8"),
        pytest.param(in_4_bits, quantisation("pack-quantized", INT4, None), "bfloat16", id="W4A16"),
    ],
)
def test_a_quantised_model_drafts(
    start_engine: Callable[..., Engine],
    target_alone: Engine,
    prompts: Callable[..., list[list[int]]],
    tmp_path: Path,
    quantise: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    config: dict[str, Any],
    dtype: str,
) -> None:
    """vLLM's kernel of W4A16 for CPUs has no float32."""
    drafter = altered(
        PAIR / "drafter", tmp_path / "drafter", partial(linear_layers, quantise), quantization_config=config
    )
    engine = start_engine(speculative={"model": str(drafter), "dtype": dtype, "branch_budget": 12, "on_miss": "skip"})
    requests = [request(prompt, max_tokens=40) for prompt in prompts(6, 5, 60, seed=5)]
    run = engine.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate(requests))
    assert_conclusive(run, hits=10, accepted=40)
    engine.close()
