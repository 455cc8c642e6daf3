"""Costs of an EAGLE-3 head, which drafts on the target's devices, one token a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_ssd.planning.prior import STEP_S, Device, Shape, forward_s
from vllm_ssd.planning.profile import Costs

DRAFT_VOCABULARY = 32_000
"""Tokens that a head draws from: published heads have that many, where the target has more."""
HEAD_STEP_S = 0.35e-3
"""Fixed overhead of a head's step in seconds, a guess: half of another forward's, as one CUDA graph holds all steps.
With it, four steps take 0.13 of a round of 70B on four H100; 0.10 to 0.16 were reported."""


def head_shape(config: Mapping[str, Any]) -> Shape:
    """Size of a dense head for the target of this config.json.

    A decoder layer of the target's width whose queries, keys and values come from the token's embedding beside the
    features, and a table of the tokens that it draws from.
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
    """`costs` of a target on `count` devices with the steps of a head in place of a draft model's."""
    steps = tuple((float(b), forward_s(head, device, count, b, b) - STEP_S + HEAD_STEP_S) for b in rows)
    return replace(costs, sync_step=steps, draft_step=steps, parallel=0)
