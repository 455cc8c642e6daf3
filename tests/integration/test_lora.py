"""A target with LoRA adapters: the drafter has none, so it drafts worse, and the text is still the target's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from engines import PAIR, Engine, assert_conclusive, request, texts
from safetensors.torch import save_file

RANK = 8


def write_adapter(folder: Path) -> Path:
    """An adapter of random weights for the query and value projections of the bundled target."""
    config = json.loads((PAIR / "target" / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    generator = torch.Generator().manual_seed(0)
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
    return folder


def test_adapted_and_plain_requests_in_one_batch(
    start_engine: Callable[..., Engine], prompts: Callable[..., list[list[int]]], tmp_path: Path
) -> None:
    adapter = str(write_adapter(tmp_path))
    requests = [
        request(prompt, max_tokens=50, join_step=2 * i, lora=adapter if i % 2 else None)
        for i, prompt in enumerate(prompts(12, 10, 100, seed=30))
    ]
    arguments = {"enable_lora": True, "max_lora_rank": RANK, "max_num_seqs": 4}
    engines = [start_engine(**arguments), start_engine(**arguments, speculative={"branch_budget": 12})]
    try:
        expected, run = engines[0].generate(requests), engines[1].generate(requests, min_seconds=0.02)
        unadapted = engines[0].generate([r | {"lora": None} for r in requests])
    finally:
        for engine in engines:
            engine.close()
    assert texts(run) == texts(expected)
    changed = [a != b for a, b in zip(texts(expected), texts(unadapted))]
    assert any(changed[1::2]) and not any(changed[::2]), "inconclusive: the adapter changes nothing"
    assert_conclusive(run, hits=20, accepted=20)
