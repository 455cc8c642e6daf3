"""The models of gpu_check.py: shapes of real models without their weights, and the bundled pair made slower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from resize_model import deepen
from torch import Tensor

from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch
from vllm_ssd.kernels import copy_pages, tree_attention

PAIR = Path(__file__).parents[1] / "tests" / "assets" / "pair"
SHAPES = {  # vocabulary, hidden size, MLP columns, layers, query heads, KV heads, head size
    "8B": (151936, 4096, 12288, 36, 32, 8, 128),
    "0.6B": (151936, 1024, 3072, 28, 16, 8, 128),
    "1B": (128256, 2048, 8192, 16, 32, 8, 64),
}
"""Of Qwen3-8B, Qwen3-0.6B and Llama-3.2-1B."""
TOY = (4096, 64, 128, 2, 2, 1, 32)
TARGET_LAYERS = 200
"""Layers of the target of the run with real text: some 7 ms a round on an H100, as long as an 8B model takes."""
MAX_MODEL_LEN = 10240


def shape_config(name: str, dry_run: bool) -> dict[str, Any]:
    """The config.json of a Llama of a shape, the toy one in a dry run."""
    vocab, hidden, columns, layers, heads, kv_heads, head_size = TOY if dry_run else SHAPES[name]
    config = json.loads((PAIR / "drafter" / "config.json").read_text())
    return config | {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": columns,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "max_position_embeddings": MAX_MODEL_LEN,
    }


def write_shape(name: str, folder: Path, dry_run: bool) -> str:
    """A folder that vLLM loads with load_format "dummy": as fast as the real model, without its weights."""
    destination = folder / name
    destination.mkdir(exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PAIR / "drafter" / file, destination)
    (destination / "config.json").write_text(json.dumps(shape_config(name, dry_run)))
    return str(destination)


def write_target(folder: Path, dry_run: bool) -> str:
    """The bundled target with idle layers added: its text, at the pace of a larger model."""
    destination = folder / "target"
    deepen(PAIR / "target", destination, 6 if dry_run else TARGET_LAYERS, "float32")
    return str(destination)


class Llama:
    """A Llama on the drafter's pages made of torch and `tree_attention`, for machines without vLLM.

    See `vllm_ssd.compat.drafter.paged.PagedModel`. weights: by their names in a checkpoint; random where None.
    """

    tree_attention = True
    mask_token_id = None
    page_size = 32

    def __init__(
        self,
        config: dict[str, Any],
        num_pages: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self.vocab_size, self.max_model_len = config["vocab_size"], config["max_position_embeddings"]
        self.num_pages, self.device, self.dtype = num_pages, device, dtype
        self._heads, self._kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self._head_size, self._eps = config["head_dim"], config["rms_norm_eps"]
        hidden, columns = config["hidden_size"], config["intermediate_size"]
        sizes = {"q": self._heads, "k": self._kv_heads, "v": self._kv_heads}
        generator = torch.Generator(device).manual_seed(0)

        def weight(name: str, *shape: int) -> Tensor:
            if weights is not None:
                return weights[f"model.{name}.weight"].to(device, dtype)
            if len(shape) == 1:
                return torch.ones(shape, device=device, dtype=dtype)
            return (torch.randn(shape, device=device, dtype=dtype, generator=generator) * 0.02).to(dtype)

        self._embedding = weight("embed_tokens", self.vocab_size, hidden)
        self._norm = weight("norm", hidden)
        self._layers = []
        for i in range(config["num_hidden_layers"]):
            name = f"layers.{i}"
            qkv = [weight(f"{name}.self_attn.{p}_proj", n * self._head_size, hidden) for p, n in sizes.items()]
            up = [weight(f"{name}.mlp.{p}_proj", columns, hidden) for p in ("gate", "up")]
            self._layers.append(
                {
                    "before": weight(f"{name}.input_layernorm", hidden),
                    "qkv": torch.cat(qkv),
                    "out": weight(f"{name}.self_attn.o_proj", hidden, self._heads * self._head_size),
                    "after": weight(f"{name}.post_attention_layernorm", hidden),
                    "up": torch.cat(up),
                    "down": weight(f"{name}.mlp.down_proj", hidden, columns),
                }
            )
        shape = (num_pages + 1, self.page_size, self._kv_heads, self._head_size)  # the last page is scrap
        self._caches = [
            [torch.zeros(shape, device=device, dtype=dtype) for _ in ("keys", "values")] for _ in self._layers
        ]
        frequencies = config["rope_theta"] ** (torch.arange(0, self._head_size, 2, device=device) / -self._head_size)
        angles = torch.arange(self.max_model_len, device=device)[:, None] * frequencies.repeat(2)
        self._cos, self._sin = angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)

    def warm_up(self, sizes: object) -> int:
        """Nothing to capture: there are no batches but trees."""
        return 0

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch | TreeBatch) -> Tensor:
        """Logits `[n, vocab]` of a `TreeBatch`, by operations that a CUDA graph can hold."""
        if not isinstance(batch, TreeBatch):
            raise TypeError("this model runs trees alone")
        scrap = self.num_pages * self.page_size
        slots = batch.slots.where(batch.slots >= 0, scrap)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        x = self._embedding[batch.token_ids.long()]
        for weights, (keys, values) in zip(self._layers, self._caches):
            qkv = F.linear(self._normed(x, weights["before"]), weights["qkv"]).unflatten(-1, (-1, self._head_size))
            query, key, value = qkv.split((self._heads, self._kv_heads, self._kv_heads), dim=1)
            keys.flatten(0, 1).index_copy_(0, slots, rotated(key, cos, sin))
            values.flatten(0, 1).index_copy_(0, slots, value.contiguous())
            attended = tree_attention(
                rotated(query, cos, sin),
                keys,
                values,
                batch.page_tables,
                batch.query_start_loc,
                batch.shared_lens,
                batch.own_pages,
                batch.own_lens,
                scale=self._head_size**-0.5,
                max_shared_len=batch.max_shared_len,
                max_rows=batch.max_rows,
            )
            x = x + F.linear(attended.flatten(1), weights["out"])
            gate, up = F.linear(self._normed(x, weights["after"]), weights["up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, weights["down"])
        x = x if batch.logit_indices is None else x[batch.logit_indices]
        return F.linear(self._normed(x, self._norm), self._embedding)

    def copy_pages(self, sources: list[int], destinations: list[int]) -> None:
        """Pages are copied by `copy_slots`."""
        raise NotImplementedError

    def copy_slots(self, sources: Tensor, destinations: Tensor, num_slots: Tensor) -> None:
        """Copy the first slots of pages to others, every layer."""
        copy_pages([half for cache in self._caches for half in cache], sources, destinations, num_slots)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[T, heads, head size]`, halves apart."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
