"""Masks of the bundled parallel drafter: what they see in training, and how drafts are counted."""

from __future__ import annotations

import sys

import pytest
import torch
from script_modules import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
try:
    import pair_parallel
    from pair_model import Llama, Shape
finally:
    sys.path.remove(str(SCRIPTS))

MASK = 188


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    llama = Llama(Shape(layers=2, intermediate=32, hidden=32, heads=2, kv_heads=1, head_dim=16))
    with torch.no_grad():
        for weight in llama.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3)
    return llama


@torch.no_grad()
def test_a_group_of_masks_sees_its_text_and_itself(model: Llama) -> None:
    tokens, anchors = torch.randint(2048, (2, 30)), torch.tensor([3, 20, 7])
    text, masked = pair_parallel.Layout(30, anchors, MASK).logits(model, tokens)
    torch.testing.assert_close(text, model(tokens), atol=1e-2, rtol=1e-3)
    for group, anchor in enumerate(anchors.tolist()):
        masks = torch.full((2, pair_parallel.MASKS), MASK)
        alone = model(torch.cat([tokens[:, : anchor + 1], masks], 1))[:, anchor + 1 :]
        torch.testing.assert_close(masked[:, group], alone, atol=1e-2, rtol=1e-3)


@torch.no_grad()
def test_accepted_drafts_are_those_that_the_text_has(model: Llama) -> None:
    """Token by token, a model accepts all drafts of its own greedy text; masks of this untrained one say less."""
    prompts = torch.randint(2048, (4 * pair_parallel.PROMPT,))
    drafters = {"sequential": (model, None), "parallel": (model, MASK)}
    found = pair_parallel.accepted_by_drafts(model, drafters, prompts, (2, 5), num_prompts=4, new=24)
    assert found["sequential"] == {2: 2.0, 5: 5.0}
    assert all(1 <= found["parallel"][k] < k for k in (2, 5)), "the first draft needs no mask"
