"""Which models can draft: what carries a state from token to token is refused before it is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ssd.compat.drafter.draft_model import mask_token_id, refuse_state
from vllm_ssd.compat.drafter.paged import UnsupportedDraftModel
from vllm_ssd.compat.drafter.tree_backend import TreeAttentionMetadataBuilder, check_builders

DECODER = {"is_hybrid": False, "is_attention_free": False, "is_encoder_decoder": False, "runner_type": "generate"}


def model(**differences: object) -> SimpleNamespace:
    return SimpleNamespace(model="org/draft", architecture="SomeForCausalLM", **{**DECODER, **differences})


@pytest.mark.parametrize(
    ("differences", "reason"),
    [
        ({"is_hybrid": True}, "recurrent or linear-attention layers, whose state branches cannot share"),
        ({"is_attention_free": True}, "recurrent or linear-attention layers"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"runner_type": "pooling"}, "is a pooling model"),
    ],
)
def test_the_refusal_says_what_can_draft(differences: dict[str, object], reason: str) -> None:
    expected = rf"org/draft \(SomeForCausalLM\) .*{reason}.*cannot draft; a draft model is a decoder with attention"
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
    with pytest.raises(UnsupportedDraftModel, match=r"org/draft .*pard_token = .* none of its 100 token ids$"):
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
