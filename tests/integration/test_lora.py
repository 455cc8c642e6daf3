"""A target with LoRA adapters: the drafter has none, so it drafts worse, and the text is still the target's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ON_V2, PAIR, Engine, assert_conclusive, request, texts
from marks import needs_v2
from safetensors.torch import save_file

RANK = 8
ADAPTED: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK, "max_num_seqs": 4}


def write_adapter(folder: Path, seed: int) -> str:
    """Write an adapter of random weights for the bundled target's queries, values and output layer; its folder."""
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
    weights["base_model.model.lm_head.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * hidden**-0.5
    weights["base_model.model.lm_head.lora_B.weight"] = torch.randn(config["vocab_size"], RANK, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    adapter = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj", "lm_head"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def reference(start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """The target alone, with room for the adapters."""
    engine = start_engine(**ADAPTED)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "runner",
    [
        "V1",
        pytest.param("V2", marks=needs_v2),
    ],
)
def test_two_adapters_in_one_batch(
    start_engine: Callable[..., Engine],
    reference: Engine,
    adapters: list[str],
    prompts: Callable[..., list[list[int]]],
    runner: str,
) -> None:
    """Requests have an adapter, all of them or none: on the CPU, vLLM applies one to those without beside those with.

    On V2, which is slow under Triton's interpreter, they are fewer and shorter.
    """
    number, max_tokens = (12, 50) if runner == "V1" else (4, 24)
    plain = [
        request(prompt, max_tokens=max_tokens, join_step=2 * i)
        for i, prompt in enumerate(prompts(number, 10, 100, seed=30))
    ]
    adapted = [asked | {"lora": adapters[i % 2]} for i, asked in enumerate(plain)]
    exchanged = [asked | {"lora": adapters[1 - i % 2]} for i, asked in enumerate(plain)]
    engine = start_engine(**ADAPTED, speculative={"branch_budget": 12}, environment=ON_V2 if runner == "V2" else {})
    try:
        runs = [engine.generate(requests, lockstep=1.0) for requests in (adapted, plain)]
    finally:
        engine.close()
    expected = [texts(reference.generate(requests)) for requests in (adapted, plain, exchanged)]
    assert [texts(run) for run in runs] == expected[:2]
    assert expected[0] not in expected[1:], "inconclusive: the adapters change nothing"
    for run in runs:
        assert_conclusive(run, hits=10, accepted=10 if runner == "V1" else 4)
