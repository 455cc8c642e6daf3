"""With a drafter that draws all drafts of a branch in one forward, text is the target's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import ON_V2, PAIR, Engine, assert_conclusive, request, texts
from marks import needs_v2
from sampling import p_value, sample

MASK = 23
"""A token of the tiny pair, untrained as a mask: first drafts are the drafter's, the others are whatever comes."""
NO_TEXT = 188
"""A token of the bundled pair that no text has, untrained as well."""
SAMPLING = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 12}]
RUN = {
    "V1": dict(prompts=[[3, 7, 1], [20, 2, 5]], num_samples=640, num_tokens=6, lockstep=1.0),
    "V2": dict(prompts=[[3, 7, 1]], num_samples=500, num_tokens=4),
}
"""On V2 kernels are interpreted: its rounds are long, and few do."""


@pytest.fixture(scope="module")
def parallel_engine(shared_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """The bundled pair, whose drafter is told that it drafts in parallel."""
    yield shared_engine(
        speculative={
            "model": str(PAIR / "drafter"),
            "hf_overrides": {"pard_token": NO_TEXT},
            "num_speculative_tokens": 8,
            "branch_budget": 24,
        }
    )


@pytest.mark.parametrize("on_miss", ["skip", "wait"])
def test_greedy_text_is_that_of_the_target_alone(
    parallel_engine: Engine, target_alone: Engine, prompts: Callable[..., list[list[int]]], on_miss: str
) -> None:
    rng = random.Random(2)
    requests = [
        request(prompt, max_tokens=rng.randint(20, 60), join_step=2 * i)
        for i, prompt in enumerate(prompts(12, 2, 100, seed=3))
    ]
    parallel_engine.call("set_config", on_miss=on_miss)
    run = parallel_engine.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate(requests))
    assert_conclusive(run, hits=20, misses=5, accepted=40)
    if on_miss == "wait":
        assert run.counts["waits"] >= 5, f"inconclusive: {run.counts}"


@pytest.fixture(
    params=[
        "V1",
        pytest.param("V2", marks=needs_v2),
    ]
)
def sampling_engine(
    request: pytest.FixtureRequest, start_engine: Callable[..., Engine], tiny_pair: tuple[Path, Path]
) -> Iterator[Engine]:
    engine = start_engine(
        model=str(tiny_pair[0]),
        max_model_len=64,
        max_num_seqs=32,
        speculative={
            "model": str(tiny_pair[1]),
            "hf_overrides": {"pard_token": MASK},
            "num_speculative_tokens": 3,
            "fan_out": 3,
            "top_m": 8,
            "on_miss": "wait",
            "wait_ms": 1000,
        },
        environment=ON_V2 if request.param == "V2" else {},
    )
    engine.run = RUN[request.param]
    yield engine
    engine.close()


def test_samples_have_the_distribution_of_the_target(sampling_engine: Engine, tiny_pair: tuple[Path, Path]) -> None:
    run, samples = sample(sampling_engine, tiny_pair[0], SAMPLING, **sampling_engine.run)
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert_conclusive(run, hits=50, misses=50, accepted=100)
    assert run.counts["known_q"] >= 200, f"inconclusive: {run.counts}"
    assert p_value(samples, min_degrees=40) > 1e-5
