"""Which models can draft: what carries a state from token to token is refused before it is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_ssd.compat.drafter.draft_model import mask_token_id, refuse_state
from vllm_ssd.compat.drafter.paged import UnsupportedDraftModel
from vllm_ssd.compat.drafter.tree_backend import (
    TreeAttentionBackend,
    TreeAttentionImpl,
    TreeAttentionMetadataBuilder,
    check_builders,
    unsupported_by_config,
)

DECODER = {
    "architecture": "SomeForCausalLM",
    "is_hybrid": False,
    "is_attention_free": False,
    "is_encoder_decoder": False,
    "runner_type": "generate",
}


def model(**differences: object) -> SimpleNamespace:
    return SimpleNamespace(**{"model": "org/draft", **DECODER, **differences})


@pytest.mark.parametrize(
    ("differences", "reason"),
    [
        ({"is_hybrid": True}, "recurrent or linear-attention layers, whose state branches cannot share"),
        ({"is_attention_free": True}, "recurrent or linear-attention layers"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"architecture": "HrmTextForCausalLM"}, "is a prefix LM, whose tokens attend to later ones"),
        ({"runner_type": "pooling"}, "is a pooling model"),
    ],
)
def test_the_refusal_says_what_can_draft(differences: dict[str, object], reason: str) -> None:
    expected = rf"org/draft \(\w+ForCausalLM\) .*{reason}.*cannot draft; a draft model is a decoder with attention"
    with pytest.raises(UnsupportedDraftModel, match=expected):
        refuse_state(model(**differences))
    refuse_state(model())


def configured(**keys: object) -> SimpleNamespace:
    return SimpleNamespace(model="org/draft", hf_config=SimpleNamespace(**keys), get_vocab_size=lambda: 100)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"pard_token": 99, "spd_type": "pard"}, 99),
        ({"ptd_token_id": 0}, 0),
        ({"pard_token": 7, "ptd_token_id": 8}, 7),
        ({"pard_token": None}, None),
        ({"mask_token_id": 5}, None),
    ],
)
def test_a_mask_token_makes_a_draft_model_parallel(keys: dict[str, object], expected: int | None) -> None:
    """Models of other kinds have a mask_token_id, too: it says nothing of parallel drafts."""
    assert mask_token_id(configured(**keys)) == expected


@pytest.mark.parametrize("token", [100, -1, 128256, "<mask>", 1.0, True])
def test_a_mask_token_that_the_model_lacks_is_refused(token: object) -> None:
    with pytest.raises(UnsupportedDraftModel, match=r"org/draft .*pard_token = .* not one of its 100 token ids$"):
        mask_token_id(configured(pard_token=token))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("ChunkedLocalAttentionBuilder", "chunked attention"),
        ("MLACommonMetadataBuilder", "latent keys"),
        ("AnotherBuilder", "AnotherBuilder"),
    ],
)
def test_a_backend_in_the_place_of_tree_attention_is_noticed(name: str, feature: str) -> None:
    plain = TreeAttentionMetadataBuilder.__new__(TreeAttentionMetadataBuilder)
    check_builders([plain, plain])
    kind = type(name, (TreeAttentionMetadataBuilder,), {"__init__": lambda self: None})
    with pytest.raises(NotImplementedError, match=f"does not support {feature}$"):
        check_builders([plain, kind()])


def attends(
    architecture: str = "LlamaForCausalLM", cache_dtype: str = "auto", **differences: object
) -> SimpleNamespace:
    keys = {key: differences.pop(key) for key in list(differences) if key.startswith(("attention_sinks", "add_"))}
    traits = {"uses_alibi": False, "attention_chunk_size": None, "use_mla": False, "head_size": 128} | differences
    head_size = traits.pop("head_size")
    text = SimpleNamespace(**keys)
    model = SimpleNamespace(architecture=architecture, hf_text_config=text, get_head_size=lambda: head_size, **traits)
    return SimpleNamespace(model_config=model, cache_config=SimpleNamespace(cache_dtype=cache_dtype))


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        (attends(), []),
        (attends(head_size=256), []),
        (attends(head_size=257), ["a head size of 257"]),
        (attends(uses_alibi=True), ["ALiBi"]),
        (attends(attention_chunk_size=64), ["chunked attention"]),
        (attends(use_mla=True, head_size=576), ["latent keys", "a head size of 576"]),
        (attends(cache_dtype="fp8"), ["a fp8 KV cache"]),
        (attends("GptOssForCausalLM"), ["attention sinks"]),
        (attends("GraniteSWAForCausalLM"), ["attention sinks"]),
        (attends("GraniteSWAForCausalLM", attention_sinks=False), []),
        (attends("MiMoV2ForCausalLM", add_swa_attention_sink_bias=True), ["attention sinks"]),
    ],
)
def test_what_tree_attention_lacks_is_known_from_the_configuration(config: SimpleNamespace, lacking: list[str]) -> None:
    assert unsupported_by_config(config) == lacking


def test_what_is_said_of_a_configuration_is_what_a_layer_refuses() -> None:
    assert TreeAttentionBackend.supports_head_size(256) and not TreeAttentionBackend.supports_head_size(257)
    for given, feature in (
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"sinks": torch.zeros(1)}, "attention sinks"),
        ({"kv_cache_dtype": "fp8"}, "a fp8 KV cache"),
    ):
        with pytest.raises(NotImplementedError, match=f"does not support {feature}$"):
            TreeAttentionImpl(4, 64, 1.0, 2, **given)
    TreeAttentionImpl(4, 64, 1.0, 2)
