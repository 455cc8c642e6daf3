"""Resized checkpoints compute the function of the checkpoint they came from."""

import json

import pytest
import torch
from safetensors.torch import load_file
from script_modules import load_script
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

resize_model = load_script("resize_model")

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def source(request, tmp_path):
    """Write a random tiny Llama and a tokenizer file beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=request.param,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


@torch.no_grad()
def logits(folder, dtype=torch.float32):
    """Return the checkpoint's logits on fixed tokens."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(TOKENS).logits


def config_of(folder):
    """Return the checkpoint's configuration."""
    return json.loads((folder / "config.json").read_text())


def test_widening_keeps_the_logits(source, tmp_path):
    resize_model.widen(source, tmp_path / "wide", 160)
    assert config_of(tmp_path / "wide")["intermediate_size"] == 160
    assert (tmp_path / "wide" / "tokenizer.json").exists()
    torch.testing.assert_close(logits(tmp_path / "wide"), logits(source), atol=1e-5, rtol=1e-5)


def test_deepening_keeps_the_logits(source, tmp_path):
    resize_model.deepen(source, tmp_path / "deep", 7)
    assert config_of(tmp_path / "deep")["num_hidden_layers"] == 7
    torch.testing.assert_close(logits(tmp_path / "deep"), logits(source), atol=0, rtol=0)


def test_the_new_weights_are_not_all_zero_and_follow_the_seed(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        resize_model.widen(source, tmp_path / name, 64, seed=seed)
    gates = [load_file(tmp_path / n / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"] for n in "abc"]
    assert gates[0][48:].abs().min() > 0
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


def test_the_dtype_is_converted_and_recorded(source, tmp_path):
    resize_model.deepen(source, tmp_path / "deep", 3, dtype="bfloat16")
    weights = load_file(tmp_path / "deep" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert config_of(tmp_path / "deep")["dtype"] == "bfloat16"


@pytest.mark.parametrize(("tool", "size"), [("widen", 16), ("deepen", 1)])
def test_shrinking_is_refused(source, tmp_path, tool, size):
    with pytest.raises(ValueError, match="already"):
        getattr(resize_model, tool)(source, tmp_path / "small", size)
