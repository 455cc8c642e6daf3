"""The bundled pair's models: small Llamas in PyTorch, and the checkpoints that vLLM loads."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pair_corpus import END_OF_TEXT, VOCABULARY
from resize_model import read_model, write_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

MAX_POSITIONS = 2048
ROPE_THETA = 10000.0
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """The sizes in which target and drafter differ, and those they share."""

    layers: int
    intermediate: int
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64

    def config(self) -> dict:
        """Return the checkpoint's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }


TARGET = Shape(layers=5, intermediate=768)
DRAFTER = Shape(layers=2, intermediate=256)


class RMSNorm(nn.Module):
    """Llama's root-mean-square normalisation."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * self.weight


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache=None, start: int = 0, seen: Tensor | None = None
    ) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            keys, values = cache
            keys[:, :, start : start + length] = k
            values[:, :, start : start + length] = v
            k, v = keys[:, :, : start + length], values[:, :, : start + length]
        groups = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=start == 0 and seen is None)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Llama's gated feed-forward block."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rotation, cache=None, start: int = 0, seen: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache, start, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama decoder whose parameter names are those of the published checkpoint format."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)


class Llama(nn.Module):
    """A small Llama with tied embeddings; returns logits."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        frequency = ROPE_THETA ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(MAX_POSITIONS), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else shape.hidden**-0.5)

    def forward(
        self,
        tokens: Tensor,
        cache=None,
        start: int = 0,
        positions: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Logits after `tokens` [B, T]; they follow each other from `start` on unless `positions` [T] are given, with
        which tokens each may look at in `seen` [T, T] bool."""
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1])
        rotation = self.cos[positions], self.sin[positions]
        x = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rotation, None if cache is None else cache[i], start, seen)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return empty keys and values for every layer."""
        size = batch, self.shape.kv_heads, length, self.shape.head_dim
        return [(torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)) for _ in self.model.layers]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions, pairing each dimension with the one half a head away."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


@torch.no_grad()
def continue_text(model: Llama, prompts: Tensor, length: int, temperature: Tensor | None = None) -> Tensor:
    """Continue each prompt to `length` tokens, greedily where its temperature is zero or absent."""
    dtype = torch.float32 if temperature is None else torch.bfloat16  # exact to measure, fast to train on
    cache = model.new_cache(len(prompts), length, dtype)
    row, fed = prompts, 0
    while row.shape[1] < length:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(row[:, fed:], cache, fed)[:, -1].float()
        fed, choice = row.shape[1], logits.argmax(-1)
        if temperature is not None:
            sampled = torch.multinomial((logits / temperature.clamp(min=0.1)[:, None]).softmax(-1), 1)[:, 0]
            choice = torch.where(temperature > 0, sampled, choice)
        row = torch.cat((row, choice[:, None]), 1)
    return row


def save_pair(out: Path, tokenizer: Tokenizer, target: Llama, drafter: Llama) -> None:
    """Write both checkpoints with their tokenizer."""
    for name, model in (("target", target), ("drafter", drafter)):
        save_model(out / name, tokenizer, model)


def save_model(folder: Path, tokenizer: Tokenizer, model: Llama, **keys: int | str) -> None:
    """Write one checkpoint with its tokenizer and further `keys` of its config.json, the weights in one move."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(model.shape.config() | keys, indent=2) + "\n")
    weights = {key: value.detach().bfloat16().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors.part", {"format": "pt"})
    (folder / "model.safetensors.part").chmod(0o644)
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")


def load(folder: Path, shape: Shape) -> Llama:
    """Return a written checkpoint in float32."""
    model = Llama(shape)
    model.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    return model


@torch.no_grad()
def weaken(model: Llama, noise: float) -> None:
    """Add normal noise to every weight matrix, `noise` times its standard deviation."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)


def write_weakened(src: Path, dst: Path, noise: float) -> None:
    """Write the drafter of `src` to `dst` with noise on its weights, as `weaken` adds it."""
    model = load(src, DRAFTER)
    weaken(model, noise)
    config, _ = read_model(src)
    write_model(src, dst, config, model.state_dict(), "bfloat16")


def load_saved(folder: Path, shape: Shape) -> Llama:
    """Return a written checkpoint in float32, after checking that transformers agrees with it."""
    from transformers import AutoModelForCausalLM

    model = load(folder, shape)
    tokens = torch.randint(VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(model(tokens), reference, atol=1e-3, rtol=1e-3)
    return model


def load_pair(folder: Path) -> tuple[Llama, Llama]:
    """Return the written target and drafter."""
    return load_saved(folder / "target", TARGET), load_saved(folder / "drafter", DRAFTER)
