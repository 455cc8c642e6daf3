"""A draft model in int8, as compressed-tensors writes it: drafts are accepted, and text is the target's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from engines import PAIR, Engine, assert_conclusive, request, texts
from safetensors.torch import load_file, save_file

INT8_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


def with_8_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`weight` [N, K] as int8, with a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def write_quantised(folder: Path) -> Path:
    """The bundled drafter in `folder`, with linear layers of 8 bits."""
    shutil.copytree(PAIR / "drafter", folder)
    weights = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            parts = with_8_bits(weight.float())
            weights |= {f"{key.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:
            weights[key] = weight
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": INT8_ACTIVATIONS}
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantised_model_drafts(
    start_engine: Callable[..., Engine],
    target_alone: Engine,
    prompts: Callable[..., list[list[int]]],
    tmp_path: Path,
) -> None:
    drafter = write_quantised(tmp_path / "drafter")
    engine = start_engine(speculative={"model": str(drafter), "branch_budget": 12, "on_miss": "skip"})
    requests = [request(prompt, max_tokens=40) for prompt in prompts(6, 5, 60, seed=5)]
    run = engine.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate(requests))
    assert_conclusive(run, hits=10, accepted=40)
    engine.close()
