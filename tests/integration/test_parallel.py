"""A target of two workers: one of them has the drafter, and tells the other what it must know."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from engines import FORKED_WORKERS, Engine, assert_conclusive, request, texts

ROUND_S = 0.02
NUM_GREEDY = 6
EAGER_BACKEND = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}
"""On the CPU, vLLM 0.32 gives later pipeline ranks their buffers in the warm-up of a compiled model only."""


@pytest.mark.parametrize(
    "parallelism",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor"),
        pytest.param(
            {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": EAGER_BACKEND}, id="pipeline"
        ),
    ],
)
def test_two_workers(
    start_engine: Callable[..., Engine],
    target_alone: Engine,
    prompts: Callable[..., list[list[int]]],
    parallelism: dict,
) -> None:
    """Small batches and little KV: requests are left out of steps, preempted, and computed again."""
    rng = random.Random(40)
    greedy = [
        request(prompt, max_tokens=rng.randint(40, 70), join_step=i)
        for i, prompt in enumerate(prompts(NUM_GREEDY, 10, 100, seed=40))
    ]
    sampled = [r | {"params": r["params"] | {"temperature": 0.8}} for r in greedy[:2]]
    engine = start_engine(
        max_model_len=256,
        max_num_batched_tokens=32,
        block_size=32,
        num_gpu_blocks_override=10,
        speculative={"branch_budget": 12},
        patches=FORKED_WORKERS
        if "pipeline_parallel_size" in parallelism
        else {},  # the others are spawned, as users' are
        **parallelism,
    )
    try:
        run = engine.generate([*greedy, *sampled], min_seconds=ROUND_S)
    finally:
        engine.close()
    assert texts(run)[:NUM_GREEDY] == texts(target_alone.generate(greedy))
    lengths = [len(tokens) for (tokens,) in texts(run)[NUM_GREEDY:]]
    assert lengths == [r["params"]["max_tokens"] for r in sampled]
    assert run.counts["vllm:num_preemptions"] > 0, "inconclusive: nothing was preempted"
    assert_conclusive(run, accepted=30)
