"""Sampled text with SSD has exactly the target's distribution, at every temperature.

A random Llama over 24 tokens has next-token probabilities that can be computed for every context that was sampled.
The test is a chi-square with a critical value of 1e-5, so that a right sampler fails once in 100,000 runs; the
proposals of the drafter deliberately falsified must be noticed at 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import Engine, assert_conclusive
from sampling import p_value, sample

PROMPTS = [[3, 7, 1], [11, 2, 5], [20, 20, 9], [4, 15, 8]]
RUN = dict(prompts=PROMPTS, num_samples=2600, num_tokens=8, lockstep=1.0)
LONGER = RUN | {"num_samples": 800, "num_tokens": 48}
SAMPLING = {
    "alike": [{"temperature": 0.7}, {"temperature": 1.0}],
    "mixed": [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.0, "allowed_token_ids": [1, 2, 5, 6, 9, 11, 14, 17, 20, 23]},
        {"temperature": 1.0, "n": 3},
        {"temperature": 1.5, "seed": 0},
    ],
}


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, shared_engine: Callable[..., Engine], tiny_pair: tuple[Path, Path]
) -> Engine:
    """An engine whose drafts are all from a known q ("wait"), or some of them from n-grams, which have none.

    The latter's proposals have the predicted bonus tokens down-weighted.
    """
    engine = shared_engine(
        model=str(tiny_pair[0]),
        max_model_len=64,
        max_num_seqs=64,
        speculative={
            "model": str(tiny_pair[1]),
            "on_miss": request.param,
            "fan_out": 2,
            "top_m": 8,
            "saguaro_c": {"wait": 1.0, "ngram": 0.3}[request.param],
        },
    )
    engine.on_miss = request.param
    return engine


@pytest.mark.parametrize(
    ("engine", "sampling"),
    [
        pytest.param("wait", "alike", marks=pytest.mark.compat),
        ("wait", "mixed"),
        ("ngram", "mixed"),
    ],
    indirect=["engine"],
)
def test_samples_have_the_distribution_of_the_target(
    engine: Engine, tiny_pair: tuple[Path, Path], sampling: str
) -> None:
    run, samples = sample(engine, tiny_pair[0], SAMPLING[sampling], **RUN)
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert_populated(engine, run, samples)
    assert p_value(samples) > 1e-5


@pytest.mark.parametrize("engine", ["wait"], indirect=True)
def test_a_wrong_q_is_noticed(engine: Engine, tiny_pair: tuple[Path, Path]) -> None:
    engine.call("distort_q", exponent=2.0)
    try:
        run, samples = sample(engine, tiny_pair[0], [{"temperature": 1.0}], **RUN)
    finally:
        engine.call("distort_q", exponent=None)
    assert_populated(engine, run, samples)
    assert p_value(samples) < 1e-6


@pytest.mark.parametrize("engine", ["ngram"], indirect=True)
def test_drafts_that_ngrams_extend_keep_the_distribution(engine: Engine, tiny_pair: tuple[Path, Path]) -> None:
    """A row verifies drafts of a known q and, after these, others that have none."""
    engine.call("keep_drafts", most=1)
    try:
        run, samples = sample(engine, tiny_pair[0], SAMPLING["alike"], **LONGER)
    finally:
        engine.call("keep_drafts", most=16)
    assert_populated(engine, run, samples)
    assert run.counts["extensions"] >= 1000, f"inconclusive: {run.counts}"
    assert p_value(samples) > 1e-5


def assert_populated(engine: Engine, run: SimpleNamespace, samples: SimpleNamespace) -> None:
    assert len(samples.tokens) >= 20_000
    assert_conclusive(run, hits=300, misses=1000, accepted=2000)
    assert run.counts["known_q"] >= 2000, f"inconclusive: {run.counts}"
    if engine.on_miss == "ngram":
        assert run.counts["ngram_drafts"] >= 200, f"inconclusive: {run.counts}"
