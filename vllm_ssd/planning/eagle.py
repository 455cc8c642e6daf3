"""Costs of an EAGLE-3 head, which drafts on the target's devices, one token per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_ssd.planning.prior import STEP_S, Device, Shape, forward_s
from vllm_ssd.planning.profile import Costs

DRAFT_VOCABULARY = 32_000
"""Vocabulary size of published heads; a target's own is used if it is smaller."""
HEAD_STEP_S = 0.35e-3
"""Guessed fixed overhead of a head's step in seconds: half of a normal forward's, as one CUDA graph holds all steps.
With it, four steps take 0.13 of a round of a 70B target on four H100; 0.10 to 0.16 were reported."""


def head_shape(config: Mapping[str, Any]) -> Shape:
    """Size of a dense EAGLE-3 head for a target with this config.json.

    The head is one decoder layer of the target's width, with QKV projections twice as wide (token embedding and target
    features, concatenated), and an output table over the draft vocabulary.
    """
    config = config.get("text_config", config)
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    one = {"num_hidden_layers": 1, "vocab_size": min(DRAFT_VOCABULARY, config["vocab_size"])}
    dense = {"num_experts": 1, "num_local_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True}
    shape = Shape.from_config({**config, **one, **dense})
    wider = config["hidden_size"] * head_size * (heads + 2 * kv_heads)
    return replace(shape, weights=shape.weights + wider, active=shape.active + wider)


def with_head(costs: Costs, head: Shape, device: Device, count: int, rows: Sequence[int]) -> Costs:
    """Replace the draft model's steps in `costs` by those of a head; count: devices of the target."""
    steps = tuple((float(b), forward_s(head, device, count, b, b) - STEP_S + HEAD_STEP_S) for b in rows)
    return replace(costs, sync_step=steps, draft_step=steps, parallel=0)
