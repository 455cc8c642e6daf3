"""A request within K tokens of `max_model_len` costs the others of its batch no drafts, and the counters stay true."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from engines import ON_V2, Engine, assert_conclusive, request, texts

Prompts = Callable[..., list[list[int]]]

MAX_MODEL_LEN = 128


@pytest.fixture(scope="module", params=["v1", "v2"])
def engine(request: pytest.FixtureRequest, start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    engine = start_engine(
        max_model_len=MAX_MODEL_LEN,
        speculative={"branch_budget": 12},
        environment=ON_V2 if request.param == "v2" else None,
    )
    engine.num_others = {"v1": 4, "v2": 2}[request.param]
    engine.min_share = {"v1": 0.2, "v2": 0.08}[request.param]  # on V2 vLLM counts filler as drafts
    yield engine
    engine.close()


def accepted_share(run: SimpleNamespace) -> float:
    """Of the drafts that were verified, as vLLM counts them."""
    return run.counts["vllm:spec_decode_num_accepted_tokens"] / run.counts["vllm:spec_decode_num_draft_tokens"]


def test_a_row_at_the_limit_costs_the_others_nothing(engine: Engine, target_alone: Engine, prompts: Prompts) -> None:
    """Some request is within K of the limit in nearly every round: vLLM then verified zeros for all."""
    others = [request(prompt, max_tokens=60) for prompt in prompts(engine.num_others, 20, 40, seed=70)]
    near = [
        request(prompt, max_tokens=4, join_step=2 * i)
        for i, prompt in enumerate(prompts(30, MAX_MODEL_LEN - 4, MAX_MODEL_LEN - 4, seed=71))
    ]
    alone = engine.generate(others, lockstep=1.0)
    both = engine.generate([*others, *near], lockstep=1.0)
    expected = target_alone.generate([*others, *near])
    assert texts(alone) == texts(expected)[: len(others)]
    assert texts(both) == texts(expected)
    assert_conclusive(alone, hits=20, accepted=50)
    assert_conclusive(both, hits=20, accepted=50)
    assert accepted_share(both) > 0.6 * accepted_share(alone)


def test_a_row_at_the_limit_has_the_drafts_that_fit(engine: Engine, target_alone: Engine, prompts: Prompts) -> None:
    """Alone, from 20 tokens below the limit to the limit itself."""
    requests = [
        request(prompt, max_tokens=MAX_MODEL_LEN - len(prompt), join_step=25 * i)
        for i, prompt in enumerate(prompts(4, MAX_MODEL_LEN - 20, MAX_MODEL_LEN - 20, seed=72))
    ]
    run = engine.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate([r | {"join_step": 0} for r in requests]))
    assert_conclusive(run, hits=4, accepted=10)
    assert accepted_share(run) > engine.min_share
