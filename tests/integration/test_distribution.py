"""Sampled text with SSD has exactly the target's distribution, at every temperature.

A random Llama over 24 tokens has next-token probabilities that can be computed for every context that was sampled.
The test is a chi-square with a critical value of 1e-5, so that a right sampler fails once in 100,000 runs; the
proposals of the drafter deliberately falsified must be noticed at 1e-6.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Engine, assert_conclusive, request, texts
from tiny_models import VOCAB_SIZE, next_token_logits, write_pair

PROMPTS = [[3, 7, 1], [11, 2, 5], [20, 20, 9], [4, 15, 8]]
NUM_SAMPLES, NUM_TOKENS = 2600, 8
ROUND_S = 0.012
"""Each round is stretched to this, so that a fair share of the blocks arrives in time."""
MIN_CONTEXT = 200
"""Samples for which a context is tested by itself; rarer ones are pooled by their position."""
MIN_EXPECTED = 5.0
"""Expected samples of a cell; ranks below are merged into one cell."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("tiny"), noise=0.2)


SAMPLING = {
    "0.7": [{"temperature": 0.7}],
    "1.0": [{"temperature": 1.0}],
    "mixed": [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.0, "n": 3},
        {"temperature": 1.5, "seed": 0},
    ],
}


@pytest.fixture(scope="module")
def engine(
    request: pytest.FixtureRequest, start_engine: Callable[..., Engine], pair: tuple[Path, Path]
) -> Iterator[Engine]:
    """An engine whose drafts are all from a known q ("wait"), or some of them from n-grams, which have none.

    The latter's proposals have the predicted bonus tokens down-weighted.
    """
    engine = start_engine(
        model=str(pair[0]),
        max_model_len=64,
        max_num_seqs=16,
        speculative={
            "model": str(pair[1]),
            "on_miss": request.param,
            "fan_out": 2,
            "top_m": 8,
            "saguaro_c": {"wait": 1.0, "ngram": 0.3}[request.param],
        },
    )
    engine.on_miss = request.param
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("engine", "sampling"),
    [
        ("wait", "0.7"),
        pytest.param("wait", "1.0", marks=pytest.mark.compat),
        ("wait", "mixed"),
        ("ngram", "mixed"),
    ],
    indirect=["engine"],
)
def test_samples_have_the_distribution_of_the_target(engine: Engine, pair: tuple[Path, Path], sampling: str) -> None:
    run, samples = sample(engine, pair, SAMPLING[sampling])
    assert samples.probs.gather(1, samples.tokens[:, None]).min() > 0, "a token that the target never samples"
    assert_populated(engine, run, samples)
    assert p_value(samples) > 1e-5


@pytest.mark.parametrize("engine", ["wait"], indirect=True)
@pytest.mark.parametrize("exponent", [0.5, 2.0], ids=["flattened", "sharpened"])
def test_a_wrong_q_is_noticed(engine: Engine, pair: tuple[Path, Path], exponent: float) -> None:
    engine.call("distort_q", exponent=exponent)
    try:
        run, samples = sample(engine, pair, SAMPLING["1.0"])
    finally:
        engine.call("distort_q", exponent=None)
    assert_populated(engine, run, samples)
    assert p_value(samples) < 1e-6


def assert_populated(engine: Engine, run: SimpleNamespace, samples: SimpleNamespace) -> None:
    assert len(samples.tokens) >= 20_000
    assert_conclusive(run, hits=1000, misses=1000, accepted=2000)
    assert run.counts["known_q"] >= 2000, f"inconclusive: {run.counts}"
    if engine.on_miss == "ngram":
        assert run.counts["ngram_drafts"] >= 200, f"inconclusive: {run.counts}"


def sample(
    engine: Engine, pair: tuple[Path, Path], sampling: list[dict[str, Any]]
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Run the requests. -> the run and its tokens [N], their probs [N, VOCAB_SIZE] and contexts [N] of any type."""
    num_requests = NUM_SAMPLES * len(sampling) // sum(params.get("n", 1) for params in sampling)
    choices = list(itertools.islice(itertools.cycle(itertools.product(PROMPTS, sampling)), num_requests))
    run = engine.generate(
        [
            # Equal seeds would give equal samples.
            request(prompt, max_tokens=NUM_TOKENS, **(params | {"seed": i} if "seed" in params else params))
            for i, (prompt, params) in enumerate(choices)
        ],
        min_seconds=ROUND_S,
    )
    rows = [(prompt, params, tokens) for (prompt, params), ids in zip(choices, texts(run)) for tokens in ids]
    generated = torch.tensor([tokens for _, _, tokens in rows])
    sequences = torch.cat([torch.tensor([prompt for prompt, _, _ in rows]), generated], dim=1)
    logits = next_token_logits(pair[0], len(PROMPTS[0]), sequences)
    probs = torch.stack([target_probs(row, **params) for row, (_, params, _) in zip(logits, rows)])
    contexts = [
        (params["temperature"], *prompt, *tokens[:i]) for prompt, params, tokens in rows for i in range(NUM_TOKENS)
    ]
    return run, SimpleNamespace(tokens=generated.flatten(), probs=probs.flatten(0, 1), contexts=contexts)


def target_probs(logits: torch.Tensor, temperature: float, top_k: int = VOCAB_SIZE, **_: Any) -> torch.Tensor:
    """What vLLM samples from, `logits` [T, VOCAB_SIZE] -> the same; all on the likeliest token at temperature 0."""
    if not temperature:
        return torch.nn.functional.one_hot(logits.argmax(-1), VOCAB_SIZE).double()
    smallest = logits.topk(top_k).values[:, -1:]
    return torch.softmax(logits.masked_fill(logits < smallest, -torch.inf) / temperature, dim=-1)


def p_value(samples: SimpleNamespace) -> float:
    """Chance of a deviation at least as large if every token was sampled from its `probs`.

    Within a group of contexts, tokens are counted by their rank under the target. Counts minus expectations have the
    covariance sum(diag(p) - p p^T), tokens being independent of each other given their contexts; for a single context
    the statistic is Pearson's.
    """
    sizes = Counter(samples.contexts)
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, context in enumerate(samples.contexts):
        groups[context if sizes[context] >= MIN_CONTEXT else (context[0], len(context))].append(i)
    ranked, tokens_at_rank = samples.probs.sort(dim=1, descending=True)
    drawn = tokens_at_rank == samples.tokens[:, None]
    statistic, degrees = 0.0, 0
    for rows in groups.values():
        probs, counts = ranked[rows], drawn[rows].sum(0).double()
        expected = probs.sum(0)
        cells = int((expected >= MIN_EXPECTED).sum())
        if cells < 2:
            continue
        probs = torch.cat([probs[:, : cells - 1], probs[:, cells - 1 :].sum(1, keepdim=True)], dim=1)[:, :-1]
        deviation = counts[: cells - 1] - probs.sum(0)
        covariance = torch.diag(probs.sum(0)) - probs.T @ probs
        statistic += float(deviation @ torch.linalg.solve(covariance, deviation))
        degrees += cells - 1
    assert degrees >= 50, f"inconclusive: {degrees} degrees of freedom"
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0).double(), torch.tensor(statistic / 2).double()))
