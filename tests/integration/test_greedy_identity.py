"""Greedy text with SSD is that of the target alone, token for token.

Both run in float32: a verification of several tokens and a decode of one then differ by about 1e-6 in the logits, and
no argmax of these prompts is that close.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from engines import Engine, assert_conclusive, request, texts

NUM_REQUESTS = 72


@pytest.fixture(scope="module")
def requests(prompts: Callable[..., list[list[int]]]) -> list[dict[str, Any]]:
    """Requests of many lengths that keep joining a batch of eight while others leave it."""
    rng = random.Random(1)
    return [
        request(prompt, max_tokens=rng.randint(1, 80), join_step=2 * i)
        for i, prompt in enumerate(prompts(NUM_REQUESTS, 2, 150))
    ]


@pytest.fixture(scope="module")
def expected(target_alone: Engine, requests: list[dict[str, Any]]) -> SimpleNamespace:
    return target_alone.generate(requests)


@pytest.fixture(scope="module", params=["skip", pytest.param("wait", marks=pytest.mark.compat), "ngram"])
def engine(request: pytest.FixtureRequest, ssd_engine: Engine) -> Engine:
    """The engine with each answer to a miss."""
    ssd_engine.call("set_config", on_miss=request.param)
    ssd_engine.on_miss = request.param
    return ssd_engine


def test_text_is_that_of_the_target_alone(
    engine: Engine, requests: list[dict[str, Any]], expected: SimpleNamespace
) -> None:
    run = engine.generate(requests, lockstep=1.0)
    assert texts(run) == texts(expected)
    assert_conclusive(run, hits=100, misses=20, accepted=100)
    assert len(run.seconds) < len(expected.seconds), "inconclusive: speculation saved no round"
    if engine.on_miss == "wait":
        assert run.counts["waits"] >= 20, f"inconclusive: {run.counts}"
    if engine.on_miss == "ngram":
        assert run.counts["ngram_drafts"] >= 100, f"inconclusive: {run.counts}"


def test_pages_return_when_requests_leave(engine: Engine, requests: list[dict[str, Any]], corpus: list[int]) -> None:
    engine.generate(requests[:16], lockstep=1.0)
    last = engine.generate([request(corpus[:8], max_tokens=100)], min_seconds=0.1)
    assert_conclusive(last)
    # 108 tokens fill 4 pages of 32; twelve branches and a just-in-time one have at most 2 each. None are left once the
    # drafter was told that the last request has one token to go.
    assert engine.call("drafter").pages_in_use <= 4 + 13 * 2
