"""Sampled text with SSD on vLLM's V2 model runner has the target's distribution; see test_distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import ON_GPU, ON_V2, Engine, assert_conclusive
from sampling import p_value, sample

SAMPLING = [
    {"temperature": 1.0, "min_p": 0.04, "logit_bias": {5: 1.0}},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.85, "allowed_token_ids": list(range(3, 20))},
]
RUN = dict(prompts=[[3, 7, 1]], num_samples=700, num_tokens=4, min_seconds=0.03 if ON_GPU else 0.0)
"""Where target and drafter share a GPU, a round waits until the drafter had its turn."""


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Engine], tiny_pair: tuple[Path, Path]) -> Iterator[Engine]:
    engine = start_engine(
        model=str(tiny_pair[0]),
        max_model_len=64,
        max_num_seqs=32,
        speculative={"model": str(tiny_pair[1]), "num_speculative_tokens": 2, "fan_out": 3, "top_m": 8},
        environment=ON_V2,
    )
    yield engine
    engine.close()


def test_samples_have_the_distribution_of_the_target(engine: Engine, tiny_pair: tuple[Path, Path]) -> None:
    run, samples = sample(engine, tiny_pair[0], SAMPLING, **RUN)
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert_conclusive(run, hits=200, misses=50, accepted=200)
    assert run.counts["known_q"] >= 400 and run.counts["cut_q"] >= 100, f"inconclusive: {run.counts}"
    assert run.counts["host_reads"] == 0
    assert p_value(samples, min_degrees=40) > 1e-5
