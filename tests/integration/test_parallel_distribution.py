"""Sampled text of a target of two workers has the target's own distribution; see test_distribution.

One worker has the drafter and knows what drafts were drawn from; every rank that samples must use the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import FORKED_WORKERS, ON_V2, Engine, assert_conclusive
from sampling import p_value, sample
from tiny_models import write_pair

PROMPTS = [[3, 7, 1], [11, 2, 5]]
SAMPLING = [{"temperature": 0.7}, {"temperature": 1.0, "top_k": 12, "top_p": 0.85}]
HOT_SAMPLING = [{"temperature": 1.2}, {"temperature": 1.0, "top_k": 16, "top_p": 0.95}]
"""Flatter, so that fewer samples fill as many cells: a round of two interpreted V2 workers takes a second."""
EAGER_BACKEND = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}
"""On the CPU, vLLM 0.32 gives later pipeline ranks their buffers in the warm-up of a compiled model only."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("tiny"), noise=0.2)


@pytest.mark.parametrize(
    "parallelism",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor"),
        pytest.param(
            {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": EAGER_BACKEND}, id="pipeline"
        ),
    ],
)
def test_samples_have_the_distribution_of_the_target(
    start_engine: Callable[..., Engine], pair: tuple[Path, Path], parallelism: dict[str, Any]
) -> None:
    engine = start_engine(
        model=str(pair[0]),
        max_model_len=64,
        max_num_seqs=96,
        speculative={"model": str(pair[1]), "on_miss": "wait", "fan_out": 2, "top_m": 8},
        patches=FORKED_WORKERS,
        **parallelism,
    )
    try:
        run, samples = sample(engine, pair[0], SAMPLING, prompts=PROMPTS, num_samples=2400, num_tokens=6)
    finally:
        engine.close()
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert_conclusive(run, accepted=1500)
    assert p_value(samples) > 1e-5


@pytest.mark.parametrize("parallelism", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_on_v2(start_engine: Callable[..., Engine], pair: tuple[Path, Path], parallelism: str) -> None:
    engine = start_engine(
        model=str(pair[0]),
        max_model_len=64,
        max_num_seqs=32,
        speculative={"model": str(pair[1]), "num_speculative_tokens": 2, "fan_out": 3, "top_m": 8},
        environment=ON_V2,
        patches=FORKED_WORKERS,
        **{parallelism: 2},
    )
    try:
        run, samples = sample(engine, pair[0], HOT_SAMPLING, prompts=PROMPTS[:1], num_samples=240, num_tokens=4)
    finally:
        engine.close()
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert_conclusive(run, accepted=60)
    assert p_value(samples, min_degrees=20) > 1e-5
