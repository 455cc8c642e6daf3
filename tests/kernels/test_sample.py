"""Sampling against its reference, and against the distribution it claims."""

from __future__ import annotations

import random

import pytest
import torch
from cases import DEVICE, ints, reference

from vllm_ssd.kernels import Sample, hashed_gumbel, sample

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
NOISE_TOLERANCE = 1e-5
"""The kernel computes the noise with vLLM's series, the reference with log1p."""
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
    foreseen: list[int] | None = None,
) -> Sample:
    """Draw with kernels and with the reference, which must agree; logits get their bias in place.

    foreseen: rows whose noise is known; they are also drawn without it, which must change their candidates alone
    """
    n = len(logits)
    arguments = (
        logits,
        torch.tensor(temperatures),
        ints([(1 << 62) + 12345 * i for i in range(n)], torch.int64),
        ints([1000 * i + 7 for i in range(n)], torch.int64),
        torch.full((n,), fan_out, dtype=torch.int32),
    )
    num_candidates = max(top_m // 2, 1)
    options = {} if truncations is None else {"truncations": torch.tensor(truncations)}
    options |= {} if bias is None else {"biases": bias[0], "bias_rows": bias[1]}

    def draw(device: str, **of_target: torch.Tensor) -> tuple[torch.Tensor, Sample]:
        copied, *others = (argument.to(device, copy=True) for argument in arguments)
        told = {name: tensor.to(device) for name, tensor in (options | of_target).items()}
        return copied, sample(copied, *others, top_m=top_m, num_candidates=num_candidates, factor=factor, **told)

    def draw_same(tolerance: float, **of_target: torch.Tensor) -> tuple[torch.Tensor, Sample, Sample]:
        on_device, got = draw(DEVICE, **of_target)
        with reference():
            biased, want = draw("cpu", **of_target)
        assert torch.equal(on_device.cpu(), biased), "the bias was added to other logits"
        same(got, want, tolerance)
        return biased, got, want

    biased, *drawn = draw_same(TOLERANCES[logits.dtype])
    assert torch.equal(drawn[-1].candidate_ids, drawn[-1].q_token_ids[:, :num_candidates])
    if foreseen is not None:
        _, *with_noise = draw_same(NOISE_TOLERANCE, target_seeds=target_seeds(n), foreseen=ints(foreseen))
        is_other = torch.tensor([not is_foreseen or not t for is_foreseen, t in zip(foreseen, temperatures)]).bool()
        for one, other in zip(with_noise, drawn):
            for name in ("token_ids", "q_token_ids", "q_probs", "draft_probs"):
                assert torch.equal(getattr(one, name), getattr(other, name)), f"{name} depend on the target's noise"
            for name in ("candidate_ids", "candidate_probs"):
                assert torch.equal(getattr(one, name).cpu()[is_other], getattr(other, name).cpu()[is_other]), name
        drawn = with_noise
    logits.copy_(biased)
    return drawn[-1]


def same(got: Sample, want: Sample, tolerance: float) -> None:
    for name in ("token_ids", "q_token_ids", "candidate_ids"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    for name in ("q_probs", "draft_probs", "candidate_probs"):
        values = getattr(got, name).cpu(), getattr(want, name)
        torch.testing.assert_close(*values, atol=tolerance, rtol=10 * tolerance)


def target_seeds(count: int) -> torch.Tensor:
    return ints([(-1) ** i * ((1 << 61) + 99991 * i) for i in range(count)], torch.int64)


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


@pytest.mark.parametrize("name, dtype", CASES)
def test_candidates_with_foreseen_noise(name, dtype):
    """Foreseen rows beside others and greedy ones, over any number of groups, against a plain formula."""
    rows, vocab_size, top_m = SHAPES[name]
    logits = (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size + 1)) * 2).to(dtype)
    temperatures, foreseen = [0.7, 0.0, 1.3, 0.9][:rows], [1, 1, 0, 2][:rows]
    drawn = draw_both(logits, temperatures, top_m, fan_out=2, factor=0.5, foreseen=foreseen)
    for i in range(rows):
        if foreseen[i] and temperatures[i]:
            best = best_candidates(logits[i], temperatures[i], i, max(top_m // 2, 1))
            assert drawn.candidate_ids[i].tolist() == [token_id for token_id, _ in best]
            probs = torch.softmax(torch.tensor([score for _, score in best]), 0)
            torch.testing.assert_close(drawn.candidate_probs[i], probs)


def best_candidates(logits: torch.Tensor, temperature: float, row: int, count: int) -> list[tuple[int, float]]:
    """The `count` tokens with the largest scores in a row of `draw_both`, and these scores."""
    place = target_seeds(row + 1)[row], ints(1000 * row + 7, torch.int64)
    noise = hashed_gumbel(*place, torch.arange(len(logits))).tolist()
    scores = [logit / temperature + g for logit, g in zip(logits.tolist(), noise, strict=True)]
    return sorted(enumerate(scores), key=lambda scored: (-scored[1], scored[0]))[:count]


def test_forbidden_tokens_are_the_last_candidates():
    """Whatever their noise; among themselves by token id, and none beyond the vocabulary."""
    logits = torch.full((3, 300), float("-inf"))
    logits[0, [7, 250]], logits[1, 70], logits[2, [63, 64, 299]] = 0.0, -50.0, 1.0
    drawn = draw_both(logits, [1.0, 0.5, 2.0], top_m=8, foreseen=[1, 1, 1])
    assert set(drawn.candidate_ids[0, :2].tolist()) == {7, 250} and drawn.candidate_ids[0, 2:].tolist() == [0, 1]
    assert drawn.candidate_ids[1].tolist() == [70, 0, 1, 2] and drawn.candidate_probs[1].tolist() == [1, 0, 0, 0]
    assert set(drawn.candidate_ids[2, :3].tolist()) == {63, 64, 299} and drawn.candidate_ids[2, 3] == 0


def test_candidates_with_foreseen_noise_follow_the_bias():
    """A forbidden token is no candidate, a favoured one is the first."""
    logits = torch.randn(3, 1003, generator=torch.Generator().manual_seed(6))
    biases = torch.zeros(3, 1003)
    biases[1, :1000], biases[2, 500] = -torch.inf, 90.0
    drawn = draw_both(logits, [1.0, 1.0, 0.8], 6, bias=(biases, ints([0, 1, 2])), foreseen=[1, 1, 1])
    assert set(drawn.candidate_ids[1].tolist()) == {1000, 1001, 1002} and drawn.candidate_ids[2, 0] == 500


def test_candidates_with_foreseen_noise_are_not_cut():
    """The target applies top-k and top-p itself."""
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(3))
    cut = draw_both(logits, [1.0, 1.0], 8, truncations=[(1, 1.0, 0.0)] * 2, foreseen=[1, 1])
    whole = draw_both(logits, [1.0, 1.0], 8, foreseen=[1, 1])
    assert torch.equal(cut.candidate_ids, whole.candidate_ids)


def test_candidates_with_foreseen_noise_in_one_group_and_in_many():
    """The group maxima are those of the scores."""
    logits = torch.zeros(2, 1600)
    logits[0, 640:656] += 40  # all in one group
    logits[1, ::100] += 40  # each in a group of its own
    drawn = draw_both(logits, [1.0, 1.0], top_m=32, foreseen=[1, 1])
    assert sorted(drawn.candidate_ids[0].tolist()) == list(range(640, 656))
    assert sorted(drawn.candidate_ids[1].tolist()) == list(range(0, 1600, 100))


@pytest.mark.parametrize("seed", range(8))
def test_candidates_of_random_shapes(seed):
    """Every mix of foreseen, greedy and other rows, with biases and truncations or without."""
    rng = random.Random(seed)
    rows, vocab_size = rng.randint(1, 5), rng.choice([rng.randint(2, 63), rng.randint(64, 700), 64 * rng.randint(1, 9)])
    top_m = rng.randint(1, min(vocab_size, 40))
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    temperatures = [rng.choice([0.0, 0.2, 1.0, 3.0]) for _ in range(rows)]
    foreseen = [rng.randint(0, 1) for _ in range(rows)]
    truncations = [(5.0, 0.9, 0.05)] * rows if rng.randint(0, 1) else None
    bias = (torch.randn(2, vocab_size), ints([rng.randint(0, 1) for _ in range(rows)])) if rng.randint(0, 1) else None
    drawn = draw_both(logits, temperatures, top_m, 2, 0.5, truncations, bias, foreseen)
    for i in range(rows):
        if foreseen[i] and temperatures[i]:
            best = best_candidates(logits[i], temperatures[i], i, max(top_m // 2, 1))
            assert drawn.candidate_ids[i].tolist() == [token_id for token_id, _ in best]


def test_the_share_of_a_draft_is_that_among_candidates():
    """That of the last candidate where it is none, and of the first where the row is greedy."""
    logits = torch.randn(40, 100, generator=torch.Generator().manual_seed(4))
    drawn = draw_both(logits, [0.0, 2.0] * 20, top_m=8, foreseen=[0, 1] * 20)
    ranks = [ids.index(int(token_id)) for ids, token_id in zip(drawn.q_token_ids.tolist(), drawn.token_ids)]
    likeliest = torch.softmax(logits.topk(4).values / torch.tensor([1.0, 2.0]).repeat(20)[:, None], -1)
    expected = [float(likeliest[i, min(rank, 3)]) for i, rank in enumerate(ranks)]
    assert drawn.draft_probs.tolist() == pytest.approx(expected, abs=1e-6)
    assert min(ranks) == 0 and max(ranks) > 4
