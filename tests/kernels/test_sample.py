"""Sampling against its reference, and against the distribution it claims."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, ints, reference

from vllm_ssd.kernels import Sample, sample

SHAPES = {
    # name: (rows, vocabulary, M)
    "one group": (3, 64, 8),
    "odd vocabulary": (4, 1003, 6),
    "M of one": (2, 130, 1),
    "all of the vocabulary": (2, 13, 13),
    "many groups": (1, 70001, 64),
    "empty batch": (0, 100, 8),
}
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
"""Arithmetic is float32 whatever the logits are."""
CASES = [(name, torch.float32) for name in SHAPES]
CASES += [("odd vocabulary", torch.float16), ("odd vocabulary", torch.bfloat16)]


def draw_both(
    logits: torch.Tensor,
    temperatures: list[float],
    top_m: int,
    fan_out: int = 0,
    factor: float = 1.0,
    truncations: list[tuple[float, float, float]] | None = None,
    bias: tuple[torch.Tensor, torch.Tensor] | None = None,
):
    n = len(logits)
    cut = None if truncations is None else torch.tensor(truncations)
    arguments = (
        logits,
        torch.tensor(temperatures),
        ints([(1 << 62) + 12345 * i for i in range(n)], torch.int64),
        ints([1000 * i + 7 for i in range(n)], torch.int64),
        torch.full((n,), fan_out, dtype=torch.int32),
    )
    on_device = cut if cut is None else cut.to(DEVICE)
    biases, bias_rows = bias or (None, None)
    told = {} if bias is None else {"biases": bias[0].to(DEVICE), "bias_rows": bias[1].to(DEVICE)}
    on_device_logits, *others = (argument.to(DEVICE, copy=True) for argument in arguments)
    sizes = {"top_m": top_m, "num_candidates": max(top_m // 2, 1)}
    got = sample(on_device_logits, *others, **sizes, factor=factor, truncations=on_device, **told)
    with reference():
        want = sample(*arguments, **sizes, factor=factor, truncations=cut, biases=biases, bias_rows=bias_rows)
    assert torch.equal(on_device_logits.cpu(), logits), "the bias was added to other logits"
    assert torch.equal(got.q_token_ids.cpu(), want.q_token_ids)
    assert torch.equal(got.token_ids.cpu(), want.token_ids)
    tolerance = TOLERANCES[logits.dtype]
    for probs, expected in ((got.q_probs, want.q_probs), (got.candidate_probs, want.candidate_probs)):
        torch.testing.assert_close(probs.cpu(), expected, atol=tolerance, rtol=10 * tolerance)
    return want


@pytest.mark.parametrize("name, dtype", CASES)
def test_sample(name, dtype):
    """Random rows, greedy ones among them; half-precision logits have many equal values."""
    rows, vocab_size, top_m = SHAPES[name]
    logits = (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 4).to(dtype)
    temperatures = [0.7, 0.0, 1.3, 1e-3][:rows]
    drawn = draw_both(logits, temperatures, top_m, fan_out=3, factor=0.25)
    for i, temperature in enumerate(temperatures):
        if not temperature:
            assert drawn.token_ids[i] == logits[i].argmax() and drawn.q_probs[i, 0] == 1


def test_equal_and_forbidden_tokens():
    """Equal logits go by token id; tokens of probability zero are never drawn."""
    logits = torch.full((3, 300), float("-inf"))
    logits[0], logits[1, [7, 250]], logits[2, 299] = 1.5, 0.0, -3.0
    drawn = draw_both(logits, [1.0, 1.0, 1.0], top_m=4)
    assert drawn.q_token_ids[0].tolist() == [0, 1, 2, 3]
    assert drawn.q_probs[1].tolist() == [0.5, 0.5, 0, 0] and drawn.token_ids[1] in (7, 250)
    assert drawn.token_ids[2] == 299


def test_largest_tokens_in_one_group_and_in_many():
    """The group maxima rule out whole groups of the vocabulary, never one that is needed."""
    logits = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))
    logits[0, 640:656] += 20  # all in one group
    logits[1, ::100] += 20  # each in a group of its own
    drawn = draw_both(logits, [1.0, 1.0], top_m=16)
    assert sorted(drawn.q_token_ids[0].tolist()) == list(range(640, 656))
    assert sorted(drawn.q_token_ids[1].tolist()) == list(range(0, 1600, 100))


def draw_many(count: int, device: str, **options) -> Sample:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0]).repeat(count, 1).to(device)
    counts = torch.arange(count, device=device)
    ones = torch.ones(count, device=device)
    return sample(logits, 0.8 * ones, counts // 100, counts % 100, 2 * ones.int(), top_m=5, **options)


def test_down_weighting_without_an_alternative_changes_nothing():
    """A factor of 0 on all tokens that have any weight would leave nothing to draw."""
    logits = torch.tensor([[0.0, 1.0, -9.0, -9.0], [0.0, 1.0, 2.0, 3.0]])
    drawn = draw_both(logits, [1.0, 1.0], top_m=2, fan_out=2, factor=0.0)
    assert drawn.q_probs.sum(1).tolist() == pytest.approx([1, 1])
    drawn = draw_both(logits, [1.0, 1.0], top_m=3, fan_out=2, factor=0.0)
    assert drawn.q_probs[1].tolist() == [0, 0, 1] and drawn.token_ids[1] == 1


def test_what_a_request_cannot_sample_is_not_proposed():
    """top_k, top_p and min_p, each alone and together, greedy rows and padding among them."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]).log().repeat(9, 1)
    everything, k = (1 << 24, 1.0, 0.0), 1 << 24
    rows = [everything, (3, 1, 0), (k, 0.75, 0), (k, 0.65, 0), (k, 1, 0.4), (2, 0.5, 0), (k, 0.7, 0.2), (3, 0.9, 0.9)]
    drawn = draw_both(logits, [1.0] * 7 + [0.0, 0.0], top_m=5, truncations=[*rows, (0, 0, 0)])
    kept = [(0, 1, 2, 3, 4), (0, 1, 2), (0, 1, 2), (0, 1), (0, 1, 2), (0,), (0, 1), (0,), (0,)]
    for q, token_id, tokens in zip(drawn.q_probs, drawn.token_ids, kept, strict=True):
        weights = torch.zeros(5)
        weights[list(tokens)] = logits[0].exp()[list(tokens)]
        torch.testing.assert_close(q, weights / weights.sum())
        assert int(token_id) in tokens


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_bias_is_added_before_anything_is_drawn(dtype):
    """To the rows that have one, before the temperature; a token that is not allowed is never drawn."""
    logits = torch.randn(4, 1003, generator=torch.Generator().manual_seed(5)).to(dtype)
    biases = torch.zeros(3, 1010)
    biases[1] = -1e4
    biases[1, [3, 700]] = 0.0
    biases[2, [5, 1002]] = 30.0
    before = logits.clone()
    drawn = draw_both(logits, [1.0, 0.0, 0.5, 1.0], top_m=8, bias=(biases, ints([0, 1, 1, 2])))
    assert torch.equal(logits[0], before[0])
    assert {3, 700} == set(drawn.q_token_ids[2, :2].tolist()) and drawn.q_probs[2, :2].sum() == 1
    assert drawn.token_ids[1] == min((3, 700), key=lambda i: -before[1, i]) and drawn.token_ids[2] in (3, 700)
    assert set(drawn.q_token_ids[3, :2].tolist()) == {5, 1002} and drawn.token_ids[3] in (5, 1002)


def test_down_weighting_follows_the_truncation():
    """Of two tokens that are left one is predicted; where it is the only one left, it keeps its weight."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(2, 1)
    drawn = draw_both(logits, [1.0, 1.0], 3, fan_out=1, factor=0.2, truncations=[(2, 1.0, 0.0), (1, 1.0, 0.0)])
    assert drawn.q_probs.flatten().tolist() == pytest.approx([0.25, 0.75, 0, 1, 0, 0])


@pytest.mark.parametrize("factor", (1.0, 0.3))
def test_draws_follow_q(factor):
    """Chi-squared over 20,000 seeds and positions; 4 degrees of freedom, 23.5 is passed once in 10,000."""
    with reference():
        drawn = draw_many(20_000, "cpu", factor=factor)
    weights = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]).div(0.8).exp() * torch.tensor([factor] * 2 + [1.0] * 3)
    q = weights / weights.sum()
    torch.testing.assert_close(drawn.q_probs, q.expand(20_000, -1), atol=1e-6, rtol=1e-5)
    expected = 20_000 * q
    counts = torch.bincount(drawn.token_ids, minlength=6)[:5]
    assert counts.sum() == 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_a_draw_depends_on_seed_and_position_alone():
    """Neither on the row's place in the batch nor on its neighbours."""
    whole = draw_many(9, DEVICE)
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    alone = [
        sample(logits, 0.8 * one, 0 * one.long(), p * one.long(), 2 * one.int(), top_m=5).token_ids.item()
        for p in range(9)
    ]
    assert alone == whole.token_ids.tolist()
    assert len(set(alone)) > 1


def test_probabilities_of_candidates_are_neither_cut_nor_one_hot():
    """They say how sure the draft model is, of greedy rows, too."""
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    temperatures = [0.0, 0.5, 2.0]
    want = draw_both(logits, temperatures, top_m=10, fan_out=2, factor=0.1, truncations=[(2.0, 0.5, 0.1)] * 3)
    for row, temperature, probs in zip(logits, temperatures, want.candidate_probs):
        torch.testing.assert_close(probs, torch.softmax(row.topk(5).values / (temperature or 1.0), -1))
