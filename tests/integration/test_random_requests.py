"""Random requests over everything that vLLM keeps per request: text, logprobs and ends are those of the target alone.

`scripts/fuzz_requests.py` runs as many as there is time for; the suite runs a few hundred.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines import ON_V2, Engine, assert_conclusive, request, texts
from random_requests import (
    VARIANTS,
    TieBreaker,
    differences,
    engine_arguments,
    random_requests,
    reference_arguments,
    reference_requests,
    same_logprobs,
)

SEED = 1
MARKERS = (316, 1989)  # "def" and "return"


def compare(
    start_engine: Callable[..., Engine], corpus: list[int], variant: str, numbers: range, **arguments: object
) -> None:
    requests = random_requests(SEED, numbers, corpus, variant, MARKERS)
    target = start_engine(**reference_arguments(variant))
    engine = start_engine(
        speculative={"branch_budget": 12, "on_miss": "skip"}, **(engine_arguments(variant) | arguments)
    )
    try:
        target.send("generate", requests=reference_requests(requests))
        run = engine.generate(requests, lockstep=0.5)
        expected = target.receive()
        assert not differences(requests, run, expected, TieBreaker(target, requests))
    finally:
        engine.close()
        target.close()
    assert_conclusive(run, hits=20, misses=5, accepted=50)


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_requests(start_engine: Callable[..., Engine], corpus: list[int], variant: str) -> None:
    first = 100 * list(VARIANTS).index(variant)
    compare(start_engine, corpus, variant, range(first, first + 38))


def test_logprobs_of_named_tokens(
    start_engine: Callable[..., Engine], target_alone: Engine, prompts: Callable[..., list[list[int]]]
) -> None:
    """Alone, and beside rows with other logprobs, where vLLM's rejection sampler raises; then without any."""
    named = [request(p, max_tokens=30, logprob_token_ids=[5, 60, 7]) for p in prompts(2, 20, 60, seed=50)]
    others = [request(p, max_tokens=30, logprobs=2, join_step=4) for p in prompts(3, 20, 60, seed=51)]
    later = [request(p, max_tokens=40, join_step=60) for p in prompts(3, 20, 60, seed=52)]
    engine = start_engine(speculative={"branch_budget": 12})
    try:
        run = engine.generate([*named, *others, *later], min_seconds=0.02)
    finally:
        engine.close()
    expected = target_alone.generate([*named, *others, *later])
    assert texts(run) == texts(expected)
    for output, plain in zip(run.outputs[:2], expected.outputs[:2]):
        found, wanted = output.samples[0].logprobs, plain.samples[0].logprobs
        assert len(found) == 30 and all(same_logprobs(a, b) for a, b in zip(found, wanted))
        assert all({5, 60, 7} <= step.keys() for step in found)
    assert_conclusive(run, hits=5, accepted=10)


def test_random_requests_on_v2(start_engine: Callable[..., Engine], corpus: list[int]) -> None:
    compare(start_engine, corpus, "processed_logprobs", range(1000, 1025), environment=ON_V2)


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_logits_on_v2(start_engine: Callable[..., Engine], prompts: Callable[..., list[list[int]]], mode: str) -> None:
    """Instead of logprobs, of every token of a round; a penalty sets the modes apart."""
    requests = [
        request(p, max_tokens=20, logprobs=1 + i, prompt_logprobs=i, repetition_penalty=1.2, join_step=i)
        for i, p in enumerate(prompts(3, 20, 40, seed=53))
    ]
    target = start_engine(logprobs_mode=mode)
    engine = start_engine(logprobs_mode=mode, speculative={"branch_budget": 12}, environment=ON_V2)
    try:
        target.send("generate", requests=requests)
        run, expected = engine.generate(requests, lockstep=1.0), target.receive()
    finally:
        engine.close()
        target.close()
    assert texts(run) == texts(expected)
    for asked, output, plain in zip(requests, run.outputs, expected.outputs):
        found = output.prompt_logprobs + output.samples[0].logprobs
        wanted = plain.prompt_logprobs + plain.samples[0].logprobs
        assert len(found) == len(wanted) == len(asked["prompt"]) - 1 + 20
        assert all(map(same_logprobs, found, wanted))
        assert max(max(step.values()) for step in wanted) > 0, "inconclusive: no logits"
    assert_conclusive(run, hits=5, accepted=10)
