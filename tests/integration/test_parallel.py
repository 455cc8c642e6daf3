"""A target of two workers: one of them has the drafter, and tells the other what it must know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines import Engine, request, texts


@pytest.mark.parametrize("parallelism", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_workers(
    start_engine: Callable[..., Engine],
    target_alone: Engine,
    prompts: Callable[..., list[list[int]]],
    parallelism: str,
) -> None:
    greedy = [request(prompt, max_tokens=40) for prompt in prompts(4, 10, 100, seed=40)]
    sampled = [r | {"params": r["params"] | {"temperature": 0.8}} for r in greedy]
    engine = start_engine(max_num_seqs=4, speculative={"branch_budget": 12}, **{parallelism: 2})
    try:
        run = engine.generate([*greedy, *sampled], min_seconds=0.03)
    finally:
        engine.close()
    assert texts(run)[:4] == texts(target_alone.generate(greedy))
    assert [len(tokens) for (tokens,) in texts(run)[4:]] == [40] * 4
    assert run.counts["vllm:spec_decode_num_accepted_tokens"] >= 20, f"inconclusive: {run.counts}"
