"""What the drafter foresees of the target's random numbers, against vLLM's own sampler."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_target import grow
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.sampler import Sampler as VLLMSampler

from vllm_ssd.compat.target.seeded_rounds import SeededRounds
from vllm_ssd.drafter.noise import Unranked, acceptance_uniforms, hashed_noise
from vllm_ssd.drafter.sampler import Sampler
from vllm_ssd.drafter.sequence import Candidates, Sequence
from vllm_ssd.kernels import hashed_gumbel
from vllm_ssd.link.noise import Replay, round_seed
from vllm_ssd.link.protocol import HASHED_NOISE, NO_NOISE, SEEDED_NOISE, UNKNOWN_NOISE, Noise

VOCAB = 97
RUNNER = SimpleNamespace(sampler=VLLMSampler())


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
def test_seeds_of_rounds_differ(seed, length):
    assert 0 <= round_seed(seed, length) < 2**32
    assert len({round_seed(seed, length + i) for i in range(50)}) == 50


@pytest.mark.parametrize("num_drafts", [1, 3, 16])
def test_a_round_of_the_v1_runner_is_repeated(monkeypatch, num_drafts):
    """All that vLLM draws in one round from a generator: for the last token, the drafts, and after a rejected one."""
    seed, length, cpu = 5, 40, torch.device("cpu")
    metadata = SimpleNamespace(generators={0: torch.Generator().manual_seed(round_seed(seed, length))})
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    last, _ = VLLMSampler().topk_topp_sampler(logits.clone(), metadata.generators, None, None)
    counts = [num_drafts]
    uniforms = rejection_sampler.generate_uniform_probs(num_drafts, counts, metadata.generators, cpu)
    inverse: list[torch.Tensor] = []  # of exponential noise, which vLLM multiplies p - q by
    monkeypatch.setattr(rejection_sampler, "_sample_recovered_tokens", lambda *args, **_: inverse.append(args[5]))
    probs, drafts = torch.ones(num_drafts, VOCAB), torch.zeros(num_drafts, dtype=torch.int64)
    rejection_sampler.sample_recovered_tokens(
        num_drafts, counts, torch.tensor(counts), drafts, None, probs, metadata, cpu
    )
    replay = Replay(seed, length, num_drafts, VOCAB)
    assert last.tolist() == [int((logits[0].numpy() + replay.after_last(np.arange(VOCAB))).argmax())]
    assert acceptance_uniforms(Noise(SEEDED_NOISE, seed), length, num_drafts) == uniforms.tolist()
    np.testing.assert_allclose(inverse[0][0].log(), replay.after_rejection(np.arange(VOCAB)), atol=1e-6)


def test_rows_with_hashed_noise_get_theirs():
    kinds, seeds, positions = np.array([UNKNOWN_NOISE, HASHED_NOISE, SEEDED_NOISE]), np.array([1, -7, 5]), np.arange(3)
    noise = hashed_noise(kinds, seeds, positions, VOCAB)
    hashed = hashed_gumbel(torch.tensor(-7), torch.tensor(1), torch.arange(VOCAB))
    assert noise is not None and torch.equal(noise, torch.stack((torch.zeros(VOCAB), hashed, torch.zeros(VOCAB))))
    assert hashed_noise(kinds[::2], seeds[::2], positions[::2], VOCAB) is None


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_candidates_are_ranked_by_the_noise_of_the_round(num_drafts):
    """Again and again, whenever the round's number of drafts changes; requests with other noise are left alone."""
    rng = np.random.default_rng(num_drafts)
    sequence = Sequence("a", 1, 0, 1.0, [1] * (10 + num_drafts), 10, noise=Noise(SEEDED_NOISE, 5))
    unranked = Unranked(rng.permutation(VOCAB)[:50].astype(np.int32), -np.sort(rng.random(50).astype(np.float32)))
    for position in range(9, 10 + num_drafts):
        sequence.candidates[position] = Candidates(np.zeros(4, np.int32), np.zeros(4), 7, 0.5, unranked)
    known = Candidates(np.array([3, 1], np.int32), np.array([0.6, 0.4]))
    sequence.candidates[8] = known
    for _ in range(2):
        sequence.rank_candidates(VOCAB)
        replay = Replay(5, 10, len(sequence.tokens) - 10, VOCAB)
        bonus = replay.after_last(np.arange(VOCAB))
        for position in range(9, len(sequence.tokens)):
            is_last = position == len(sequence.tokens) - 1
            noise = bonus if is_last else replay.after_rejection(np.arange(VOCAB))
            scores = np.full(VOCAB, -np.inf, np.float32)
            scores[unranked.token_ids] = unranked.scores + noise[unranked.token_ids]
            found = sequence.candidates[position]
            assert found.token_ids.tolist() == np.argsort(-scores)[:4].tolist()
            np.testing.assert_allclose(found.probs, torch.tensor(np.sort(-scores)[:4]).neg().softmax(0), rtol=1e-4)
            assert (found.drawn, found.draft_prob) == (7, 0.5)
        assert sequence.candidates[8] is known
        sequence.tokens.append(2)
        sequence.candidates[len(sequence.tokens) - 1] = sequence.candidates[9]
    sequence.noise = Noise(HASHED_NOISE, 5)
    before = dict(sequence.candidates)
    sequence.rank_candidates(VOCAB)
    assert sequence.candidates == before


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_noise_ranks_candidates_and_leaves_drafts_alone(temperature):
    rng = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(6, VOCAB, generator=rng), torch.randn(6, VOCAB, generator=rng)
    temperatures = np.array([temperature] * 5 + [0], np.float32)
    noise[4:] = 0  # unknown, and greedy
    plain = Sampler(num_candidates=5, top_m=8, seed=3).draw(logits, temperatures)
    draw = Sampler(num_candidates=5, top_m=8, seed=3).draw(logits, temperatures, noise=noise)
    for name in ("drawn", "draft_probs", "q_token_ids", "q_probs"):
        np.testing.assert_array_equal(getattr(draw, name), getattr(plain, name))
    scores = logits / torch.tensor([temperature] * 5 + [1.0])[:, None] + noise
    best = scores.topk(5)
    np.testing.assert_array_equal(draw.candidates, best.indices)
    np.testing.assert_allclose(draw.candidate_probs, best.values.softmax(-1), rtol=1e-5)
    np.testing.assert_array_equal(draw.candidates[4:], plain.candidates[4:])
    assert (draw.candidates[:4] != plain.candidates[:4]).any()


def test_the_probability_of_a_draft_is_its_share_of_the_likeliest_tokens():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 200)
    draw = Sampler(num_candidates=2, top_m=4, seed=0).draw(logits, np.ones(200, np.float32))
    shares = torch.softmax(logits[0, :2], 0).tolist()
    assert set(draw.drawn.tolist()) == {0, 1, 2, 3}
    for token, prob in zip(draw.drawn.tolist(), draw.draft_probs.tolist()):
        assert prob == pytest.approx(shares[min(token, 1)])


def batch_of(request_ids: list[str], lengths: list[int], generators: dict[int, torch.Generator]) -> SimpleNamespace:
    """What `SeededRounds` reads of vLLM's `InputBatch`."""
    return SimpleNamespace(
        req_ids=request_ids,
        num_tokens_no_spec=np.array(lengths),
        sampling_metadata=SimpleNamespace(generators=generators),
    )


def params(temperature: float = 1.0, seed: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(temperature=temperature, seed=seed)


def test_rounds_are_seeded_for_sampled_requests_without_a_seed():
    torch.manual_seed(0)
    rounds = SeededRounds()
    noise = rounds.start(RUNNER, "sampled", params())
    assert noise.kind == SEEDED_NOISE
    assert rounds.start(RUNNER, "greedy", params(0.0)) == NO_NOISE == rounds.start(RUNNER, "seeded", params(seed=3))
    own = torch.Generator().manual_seed(3)
    batch = batch_of(["greedy", "seeded", "sampled"], [5, 6, 7], {1: own})
    generators = batch.sampling_metadata.generators
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), rounds.seeded(batch):
            assert generators.keys() == {1, 2} and generators[1] is own
            expected = torch.Generator().manual_seed(round_seed(noise.seed, 7))
            assert torch.rand(4, generator=generators[2]).tolist() == torch.rand(4, generator=expected).tolist()
            raise ZeroDivisionError
        assert generators == {1: own}, "vLLM was left with our generators"
    rounds.finish(["sampled", "never seen"])
    with rounds.seeded(batch):
        assert generators == {1: own}


def test_ranks_draw_the_same_seeds():
    seeds = []
    for _ in range(2):
        torch.manual_seed(11)
        rounds = SeededRounds()
        seeds.append([rounds.start(RUNNER, name, params()).seed for name in "abc"])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 3


def test_an_unknown_sampler_is_left_alone():
    def draw(logits, generators, k, p):
        return logits.argmax(-1), None

    for sampler in (SimpleNamespace(topk_topp_sampler=draw), SimpleNamespace(topk_topp_sampler=None)):
        rounds = SeededRounds()
        assert rounds.start(SimpleNamespace(sampler=sampler), "a", params()) == NO_NOISE
        batch = batch_of(["a"], [3], {})
        with rounds.seeded(batch):
            assert not batch.sampling_metadata.generators


def test_uniform_numbers_of_unknown_noise_are_unknown():
    assert acceptance_uniforms(NO_NOISE, 10, 4) == []
    hashed = acceptance_uniforms(Noise(HASHED_NOISE, random.Random(0).getrandbits(60)), 10, 4)
    assert len(set(hashed)) == 4 and all(0 <= u < 1 for u in hashed)


@pytest.mark.parametrize("noise", [Noise(HASHED_NOISE, -9), Noise(SEEDED_NOISE, 9)], ids=["hashed", "seeded"])
def test_branches_start_with_the_tokens_that_the_noise_favours(make_target, noise):
    """At every fork point, after a prompt and after hits; with device pages the noise is the kernel's."""
    target = make_target(fan_out=2, max_fan_out=2, max_branches=16, top_m=13)
    if target.model.tree_attention and noise.kind == SEEDED_NOISE:
        pytest.skip("V1 on a CPU has no tree attention, so seeded noise meets host pages only")
    target.open("a", [1, 2, 3, 4, 5], 0.8, noise=noise)
    num_seen = 0
    for _ in range(5):
        grow(target)
        sequence, blocks = target.engine.sequences["a"], target.blocks["a"]
        spine, length = sequence.tokens, sequence.length
        for k in range(len(spine) - length + 1):
            scores = target.model.reference_logits(spine[: length + k]) / 0.8
            scores = scores + noise_at(noise, length, k, len(spine) - length)
            if k < len(spine) - length:
                scores[spine[length + k]] = -np.inf
            firsts = [token for accept_length, token in blocks if accept_length == k]  # as many as the budget allows
            assert sorted(firsts) == sorted(scores.topk(len(firsts)).indices.tolist())
            num_seen += len(firsts)
        (k, bonus), drafts = sorted(blocks.items())[-1]
        target.advance("a", target.drafts["a"][:k] + [bonus], list(drafts))
    assert num_seen >= 20


def noise_at(noise: Noise, length: int, accept_length: int, num_drafts: int) -> torch.Tensor:
    """The noise of a round's bonus token over the 13 tokens of the fake model."""
    if noise.kind == SEEDED_NOISE:
        replay = Replay(noise.seed, length, num_drafts, 13)
        draw = replay.after_last if accept_length == num_drafts else replay.after_rejection
        return torch.from_numpy(draw(np.arange(13)))
    return hashed_gumbel(torch.tensor(noise.seed), torch.tensor(length - 1 + accept_length), torch.arange(13))
