"""Drafters with other token ids than the target's: drafts are accepted, and text is the target's own.

Greedy requests must take the likeliest token of the target each time; sampled ones have its distribution, see
test_distribution.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from altered_models import altered
from engines import ON_V2, PAIR, Engine, assert_conclusive, request, texts
from marks import needs_v2
from sampling import p_value, sample
from tiny_models import VOCAB_SIZE, WORDS, write_with_words

SAMPLING = [{"temperature": 1.0}, {"temperature": 1.0, "top_k": 12, "top_p": 0.8}]
RUN = dict(prompts=[[3, 7, 1], [20, 2, 5]], num_tokens=6, lockstep=1.0)
NUM_SAMPLES = {"V1": 640, "V2": 400}
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
        "padded on V1",
        pytest.param("heterogeneous on V2", marks=needs_v2),
        pytest.param("padded on V2", marks=needs_v2),
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
    greedy, samples = sample(engine, tiny_pair[0], [{"temperature": 0.0}], num_samples=80, **RUN)
    assert_conclusive(greedy, hits=5, accepted=20)
    assert samples.probs.gather(1, samples.tokens[:, None]).min() == 1, "not the target's likeliest token"
    number = NUM_SAMPLES["V2" if engine.on_v2 else "V1"]
    run, samples = sample(engine, tiny_pair[0], SAMPLING, num_samples=number, **RUN)
    assert_conclusive(run, hits=50, misses=50, accepted=100)
    assert run.counts["known_q"] >= 200 and run.counts["cut_q"] >= 50, f"inconclusive: {run.counts}"
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert p_value(samples, min_degrees=40) > 1e-5


ADDED = ("<|call|>", "<|result|>", "<|user|>")
"""Tokens that a target was given when it was fine-tuned."""
EMBEDDING = "model.embed_tokens.weight"


def write_with_added(folder: Path, like: list[int]) -> int:
    """The bundled target in `folder` with a row more for each of `ADDED`: it says the i-th wherever it would have said
    token `like[i]`, and reads it as that; -> the first one's id."""
    size = json.loads((PAIR / "target" / "config.json").read_text())["vocab_size"]

    def with_rows(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = weights[EMBEDDING]
        return weights | {EMBEDDING: torch.cat([embedding, 1.05 * embedding[like]])}

    altered(PAIR / "target", folder, with_rows, vocab_size=size + len(ADDED))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [special | {"id": size + i, "content": word} for i, word in enumerate(ADDED)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return size


def test_a_target_with_added_tokens(
    start_engine: Callable[..., Engine],
    prompts: Callable[..., list[list[int]]],
    corpus: list[int],
    tmp_path: Path,
) -> None:
    """The draft model's embedding has fewer rows than the target's. Prompts and answers contain each added token, and
    none is beyond its end."""
    like = [token for token, _ in Counter(corpus).most_common(12)[9:]]
    first = write_with_added(tmp_path / "target", like)
    added = range(first, first + len(ADDED))
    names = dict(zip(like, added))
    requests = [
        request([names.get(token, token) for token in prompt], max_tokens=60, join_step=2 * i)
        for i, prompt in enumerate(prompts(8, 30, 100, seed=90))
    ]
    target = start_engine(model=str(tmp_path / "target"))
    engine = start_engine(
        model=str(tmp_path / "target"), speculative={"branch_budget": 12, "on_miss": "wait", "wait_ms": 1000}
    )
    try:
        target.send("generate", requests=requests)
        run, expected = engine.generate(requests, lockstep=1.0), texts(target.receive())
    finally:
        engine.close()
        target.close()
    for tokens in ([asked["prompt"] for asked in requests], [tokens for (tokens,) in expected]):
        assert set(added) <= set().union(*tokens), "inconclusive: an added token is missing"
    assert texts(run) == expected
    assert_conclusive(run, hits=20, accepted=50)
