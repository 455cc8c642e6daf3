"""A target with LoRA adapters: the drafter has none, so it drafts worse, and the text is still the target's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from engines import PAIR, Engine, assert_conclusive, request, texts
from safetensors.torch import save_file

RANK = 8


def write_adapter(folder: Path, seed: int) -> str:
    """Write an adapter of random weights for the bundled target's query and value projections; its folder."""
    folder.mkdir()
    config = json.loads((PAIR / "target" / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in (("q_proj", config["num_attention_heads"]), ("v_proj", config["num_key_value_heads"])):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * hidden**-0.5
            weights[f"{key}.lora_B.weight"] = torch.randn(heads * head, RANK, generator=generator) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return str(folder)


def test_two_adapters_in_one_batch(
    start_engine: Callable[..., Engine], prompts: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    """Every request has an adapter: on the CPU, vLLM 0.32 applies one to those without beside those with."""
    adapters = [write_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    requests = [
        request(prompt, max_tokens=50, join_step=2 * i, lora=adapters[i % 2])
        for i, prompt in enumerate(prompts(12, 10, 100, seed=30))
    ]
    arguments = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK, "max_num_seqs": 4}
    engines = [start_engine(**arguments), start_engine(**arguments, speculative={"branch_budget": 12})]
    try:
        expected, run = engines[0].generate(requests), engines[1].generate(requests, lockstep=1.0)
        exchanged = engines[0].generate([r | {"lora": adapters[1 - i % 2]} for i, r in enumerate(requests)])
    finally:
        for engine in engines:
            engine.close()
    assert texts(run) == texts(expected)
    assert texts(exchanged) != texts(expected), "inconclusive: the adapters change nothing"
    assert_conclusive(run, hits=10, accepted=10)
