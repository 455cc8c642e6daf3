"""Guessed costs of mixtures of experts and of EAGLE-3 heads."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from vllm_ssd.planning import DEVICES, Shape, guess_profile, predict_plain, predict_sd
from vllm_ssd.planning.eagle import DRAFT_VOCABULARY, head_shape, with_head
from vllm_ssd.planning.prior import distinct_experts, forward_s

MIXTURE = Shape(400e9, 17e9, 60, 1e5, 1.0, experts=256, experts_per_token=8)
LLAMA_70B = dict(
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(("experts", "per_token", "tokens"), [(8, 2, 3), (16, 1, 20), (64, 8, 6)])
def test_distinct_experts_are_those_of_random_routing(experts, per_token, tokens):
    source = random.Random(1)
    routed = [
        len({expert for _ in range(tokens) for expert in source.sample(range(experts), per_token)}) for _ in range(4000)
    ]
    assert distinct_experts(experts, per_token, tokens) == pytest.approx(sum(routed) / len(routed), rel=0.01)


def test_a_mixture_reads_what_its_tokens_use():
    assert MIXTURE.read(1) == pytest.approx(MIXTURE.active)
    assert MIXTURE.read(100_000) == pytest.approx(MIXTURE.weights)
    assert MIXTURE.active < MIXTURE.read(6) < 6 * MIXTURE.active
    coarse = replace(MIXTURE, experts=128, experts_per_token=1)
    assert coarse.read(6) < MIXTURE.read(6), "the fewer experts a token uses, the more tokens share the rest"


def test_drafts_cost_a_mixture_most_at_small_batches():
    """At batch 1 six tokens read other experts than one does, at 64 all are read anyway."""
    device = DEVICES["H100"]
    times = {(b, m): forward_s(MIXTURE, device, 8, b * m, b) for b in (1, 64) for m in (1, 6)}
    assert times[1, 6] > 2 * times[1, 1] and times[64, 6] < 1.2 * times[64, 1]
    dense = Shape.of_size(17e9)
    assert forward_s(dense, device, 8, 6, 1) == pytest.approx(forward_s(dense, device, 8, 1, 1))
    found = guess_profile(MIXTURE, Shape.of_size(1e9), device, 8, 0.8)
    gain = {
        b: predict_sd(found, found.acceptance[0], b, 4).tokens_per_s / predict_plain(found, b).tokens_per_s
        for b in (1, 64)
    }
    assert gain[1] < 1 < gain[64]


def test_a_config_says_how_many_experts_there_are():
    mixture = Shape.from_config(LLAMA_70B | {"num_local_experts": 8, "num_experts_per_tok": 2})
    assert (mixture.experts, mixture.experts_per_token) == (8, 2)
    assert mixture.read(2) < mixture.read(3) < mixture.weights
    for config in (LLAMA_70B, LLAMA_70B | {"num_local_experts": 2, "num_experts_per_tok": 2}):
        dense = Shape.from_config(config)
        assert not dense.experts and dense.read(2) == dense.weights
    with pytest.raises(ValueError, match="from 1 to 7 with 8 experts, got 8"):
        replace(MIXTURE, experts=8)


def test_an_eagle_head_is_a_layer_and_a_small_table():
    layer = Shape.from_config(LLAMA_70B | {"num_hidden_layers": 1, "vocab_size": 1, "tie_word_embeddings": True})
    head = head_shape(LLAMA_70B)
    assert head.layers == 1 and not head.experts
    table, wider = DRAFT_VOCABULARY * 8192, 8192 * 128 * (64 + 2 * 8)
    assert head.weights == head.active == pytest.approx(layer.weights + table + wider, rel=1e-4)
    assert head_shape(LLAMA_70B | {"vocab_size": 2048}).weights < head.weights - 29_000 * 8192
    experts = {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
    assert head_shape(LLAMA_70B | experts) == head


def test_four_steps_of_a_head_take_the_reported_share_of_a_round():
    device, target = DEVICES["H100"], Shape.from_config(LLAMA_70B)
    own = guess_profile(target, Shape.of_size(1e9), device, 4, 0.8)
    costs = with_head(own.costs, head_shape(LLAMA_70B), device, 4, (1, 64))
    round_s = predict_sd(replace(own, costs=costs), own.acceptance[0], 1, 4).round_s
    assert 0.10 <= 4 * costs.sync_step_s(1) / round_s <= 0.16
    assert costs.sync_step_s(1) < own.costs.sync_step_s(1) and costs.verify == own.costs.verify
