"""A drafter that knows the target's noise foresees bonus tokens that are drawn at random.

Here the drafter is the target itself, at T = 1: nearly all drafts are accepted, and the bonus token is the drafter's
first candidate if it ranks them by the right noise. Of tokens drawn with another noise, hardly half are the likeliest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import ON_V2, Engine, assert_conclusive, request

PROMPTS = [[3, 7, 1], [11, 2, 5], [20, 20, 9], [4, 15, 8]]


@pytest.fixture(params=["V1", "V2"])
def engine(request: pytest.FixtureRequest, start_engine: Callable[..., Engine], tiny_pair: tuple[Path, Path]) -> Engine:
    return start_engine(
        model=str(tiny_pair[0]),
        max_model_len=64,
        max_num_seqs=4,
        speculative={
            "model": str(tiny_pair[0]),
            "num_speculative_tokens": 3,
            "on_miss": "skip",
            "fan_out": 1,
            "top_m": 24,
        },
        environment=ON_V2 if request.param == "V2" else None,
    )


def test_a_drafter_like_the_target_foresees_what_it_draws(engine: Engine) -> None:
    sampled = [request(prompt, temperature=1.0, max_tokens=56) for prompt in PROMPTS]
    run = engine.generate(sampled, lockstep=1.0)
    assert_conclusive(run, hits=30)
    hits, misses = run.counts["hits"], run.counts["misses"]
    assert hits > 0.9 * (hits + misses), run.counts
    if engine.on_v2:
        return
    # vLLM's V1 runner draws with another noise if a request has a seed.
    seeded = [request(prompt, temperature=1.0, max_tokens=56, seed=i) for i, prompt in enumerate(PROMPTS)]
    counts = engine.generate(seeded, lockstep=1.0).counts
    assert counts["hits"] < 0.7 * (counts["hits"] + counts["misses"]), counts
