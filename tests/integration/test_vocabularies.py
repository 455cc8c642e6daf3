"""Drafters with other token ids than the target's: drafts are accepted, and text is the target's own.

Greedy requests must take the likeliest token of the target each time; sampled ones have its distribution, see
test_distribution.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import HAS_V2, ON_V2, Engine, assert_conclusive
from sampling import p_value, sample
from tiny_models import VOCAB_SIZE, WORDS, write_with_words

SAMPLING = [{"temperature": 1.0}, {"temperature": 1.0, "top_k": 12, "top_p": 0.8}]
RUN = dict(prompts=[[3, 7, 1], [20, 2, 5]], num_samples=640, num_tokens=6, lockstep=1.0)
OTHER_WORDS = [*random.Random(0).sample(WORDS, VOCAB_SIZE - 4), *"abcdef"]
"""All but four of the target's tokens under other ids, and six of its own."""
DRAFTERS = {"heterogeneous": (OTHER_WORDS, 32), "padded": (WORDS, 40)}


@pytest.fixture(scope="module")
def drafters(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("drafters")
    return {name: write_with_words(tiny_pair[1], folder / name, *given) for name, given in DRAFTERS.items()}


@pytest.fixture(
    params=[
        "heterogeneous on V1",
        pytest.param("padded on V2", marks=pytest.mark.skipif(not HAS_V2, reason="0.31: ssd uses the V1 runner")),
    ]
)
def engine(
    request: pytest.FixtureRequest,
    start_engine: Callable[..., Engine],
    tiny_pair: tuple[Path, Path],
    drafters: dict[str, Path],
) -> Iterator[Engine]:
    name, _, runner = request.param.partition(" on ")
    engine = start_engine(
        model=str(tiny_pair[0]),
        max_model_len=64,
        max_num_seqs=48,
        speculative={
            "model": str(drafters[name]),
            "heterogeneous_vocab": name == "heterogeneous",
            "num_speculative_tokens": 3,
            "fan_out": 3,
            "top_m": 64,
            "on_miss": "wait",
            "wait_ms": 1000,
        },
        environment=ON_V2 if runner == "V2" else {},
    )
    yield engine
    engine.close()


def test_text_is_the_targets_whatever_the_drafter_calls_its_tokens(
    engine: Engine, tiny_pair: tuple[Path, Path]
) -> None:
    greedy, samples = sample(engine, tiny_pair[0], [{"temperature": 0.0}], **RUN | {"num_samples": 80})
    assert_conclusive(greedy, hits=5, accepted=20)
    assert samples.probs.gather(1, samples.tokens[:, None]).min() == 1, "not the target's likeliest token"
    run, samples = sample(engine, tiny_pair[0], SAMPLING, **RUN | ({"num_samples": 400} if engine.on_v2 else {}))
    assert_conclusive(run, hits=50, misses=50, accepted=100)
    assert run.counts["known_q"] >= 200 and run.counts["cut_q"] >= 50, f"inconclusive: {run.counts}"
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert p_value(samples, min_degrees=40) > 1e-5
