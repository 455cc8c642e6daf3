"""Requests as a server sees them: greedy text with SSD is that of the target alone, whatever was asked for."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engines import Engine, assert_conclusive, request, texts

Prompts = Callable[..., list[list[int]]]

MAX_MODEL_LEN = 512  # of every engine here
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "lines": {"type": "integer", "maximum": 9999}},
    "required": ["name", "lines"],
    "additionalProperties": False,
}
COMMON = ["the tokens that are commonest in the corpus"]
CODE = r"def [a-z_]{3,12}\((self|cls), [a-z]{1,8}\):\n    return [a-z]{1,8}\n"


@pytest.fixture(scope="module")
def engine(ssd_engine: Engine) -> Engine:
    return ssd_engine


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"stop": ["\n\n", "return"]}, id="stop-strings"),
        pytest.param({"stop": [")"], "include_stop_str_in_output": True}, id="stop-string-kept"),
        pytest.param({"stop_token_ids": COMMON}, id="stop-tokens"),
        pytest.param({"stop_token_ids": COMMON, "min_tokens": 30}, id="min-tokens"),
        pytest.param({"repetition_penalty": 1.3}, id="repetition-penalty"),
        pytest.param({"presence_penalty": 0.8, "frequency_penalty": 0.4}, id="presence-frequency-penalty"),
        pytest.param({"bad_words": ["self", " the", "return"]}, id="bad-words"),
        pytest.param({"allowed_token_ids": list(range(40, 600))}, id="allowed-tokens"),
        pytest.param({"allowed_token_ids": list(range(40, 70))}, id="few-allowed-tokens"),
        pytest.param({"regex": CODE, "ignore_eos": False}, id="regex"),
        pytest.param({"json_schema": SCHEMA, "ignore_eos": False}, id="json-schema"),
    ],
)
def test_sampling_parameters(
    engine: Engine, target_alone: Engine, prompts: Prompts, corpus: list[int], params: dict[str, Any]
) -> None:
    if params.get("stop_token_ids") is COMMON:
        params = params | {
            "stop_token_ids": [token for token, _ in Counter(corpus).most_common(6)],
            "ignore_eos": False,
        }
    requests = [
        request(prompt, max_tokens=60, join_step=3 * i, **params)
        for i, prompt in enumerate(prompts(10, 20, 120, seed=2))
    ]
    run, expected = engine.generate(requests, lockstep=1.0), target_alone.generate(requests)
    assert texts(run) == texts(expected)
    samples = [output.samples[0] for output in run.outputs]
    plain = [output.samples[0] for output in expected.outputs]
    for field in ("text", "finish_reason", "stop_reason"):
        assert [getattr(s, field) for s in samples] == [getattr(s, field) for s in plain]
    stopped = [s for s in samples if s.finish_reason == "stop"]
    if params.keys() & {"stop", "stop_token_ids", "regex", "json_schema"}:
        assert stopped, "inconclusive: no text came to its end"
    if "min_tokens" in params:
        assert any(len(s.token_ids) > 30 for s in stopped) and all(len(s.token_ids) >= 30 for s in samples)
    if "regex" in params:
        assert all(re.fullmatch(CODE, s.text) for s in stopped)
    if "json_schema" in params:
        assert all(json.loads(s.text).keys() == {"name", "lines"} for s in stopped)
    assert_conclusive(run, hits=10, accepted=10)


def test_logprobs(engine: Engine, target_alone: Engine, prompts: Prompts) -> None:
    requests = [request(prompt, max_tokens=40, logprobs=4) for prompt in prompts(6, 20, 120, seed=3)]
    run, expected = engine.generate(requests, lockstep=1.0), target_alone.generate(requests)
    assert texts(run) == texts(expected)
    for output, plain in zip(run.outputs, expected.outputs):
        for found, wanted in zip(output.samples[0].logprobs, plain.samples[0].logprobs):
            assert found.keys() == wanted.keys()
            assert all(math.isclose(found[token], wanted[token], abs_tol=1e-3) for token in wanted)
    assert_conclusive(run, hits=10, accepted=10)


def test_samples_of_one_prompt(engine: Engine, prompts: Prompts) -> None:
    """`n` > 1 and seeds: the texts are the sampler's to choose, their number and lengths are not."""
    requests = [
        request(prompt, max_tokens=30, temperature=0.8, top_p=0.95, n=4, seed=i)
        for i, prompt in enumerate(prompts(4, 40, 120, seed=4))
    ]
    run = engine.generate(requests, lockstep=1.0)
    for samples in texts(run):
        assert [len(sample) for sample in samples] == [30] * 4
        assert len({tuple(sample) for sample in samples}) > 1
    assert_conclusive(run, hits=10, accepted=10)
    assert run.counts["known_q"] >= 50, f"inconclusive: {run.counts}"


def test_greedy_rows_beside_sampled_ones(engine: Engine, target_alone: Engine, prompts: Prompts) -> None:
    temperatures = [0.0, 0.7, 0.0, 1.2]
    requests = [
        request(prompt, max_tokens=50, temperature=temperatures[i % 4], join_step=2 * i)
        for i, prompt in enumerate(prompts(24, 4, 120, seed=5))
    ]
    run = engine.generate(requests, lockstep=1.0)
    expected = target_alone.generate(requests[::2])
    assert texts(run)[::2] == texts(expected)
    assert_conclusive(run, hits=50, accepted=50)
    assert run.counts["known_q"] >= 100, f"inconclusive: {run.counts}"


def test_aborted_requests_leave_the_others_alone(engine: Engine, target_alone: Engine, prompts: Prompts) -> None:
    requests = [
        request(prompt, max_tokens=60, join_step=2 * i, abort_after=5 + i if i % 3 == 0 else None)
        for i, prompt in enumerate(prompts(18, 4, 100, seed=6))
    ]
    run = engine.generate(requests, lockstep=1.0)
    expected = target_alone.generate([r | {"abort_after": None} for r in requests])
    for i, ((tokens,), (plain,)) in enumerate(zip(texts(run), texts(expected))):
        assert tokens == (plain[: len(tokens)] if requests[i]["abort_after"] else plain)
    assert_conclusive(run, hits=30, accepted=30)


def test_requests_that_reach_max_model_len(engine: Engine, target_alone: Engine, prompts: Prompts) -> None:
    """Rows near the limit have drafts trimmed, and vLLM asks nobody for drafts while one row is within K of it."""
    long = prompts(6, MAX_MODEL_LEN - 60, MAX_MODEL_LEN - 1, seed=7)
    requests = [
        request(prompt, max_tokens=MAX_MODEL_LEN - len(prompt), join_step=4 * i) for i, prompt in enumerate(long)
    ]
    requests += [request(prompt, max_tokens=100) for prompt in prompts(2, 10, 40, seed=8)]
    run, expected = engine.generate(requests, lockstep=1.0), target_alone.generate(requests)
    assert texts(run) == texts(expected)
    assert [len(r["prompt"]) + len(t[0]) for r, t in zip(requests[:6], texts(run))] == [MAX_MODEL_LEN] * 6
    assert_conclusive(run, hits=10, accepted=10)


def test_chunked_prefill_prefix_caching_and_preemption(
    start_engine: Callable[..., Engine], target_alone: Engine, corpus: list[int]
) -> None:
    """Prompts longer than a batch, common prefixes, and a target whose KV holds only part of what it was given."""
    rng = random.Random(9)
    requests = []
    for i in range(24):
        prefix = corpus[(start := 1000 * (i % 4)) : start + 96]
        rest = corpus[(start := rng.randrange(len(corpus) - 200)) : start + rng.randint(1, 150)]
        requests.append(request(prefix + rest, max_tokens=rng.randint(60, 200), join_step=i))
    engine = start_engine(
        max_num_batched_tokens=64,
        enable_prefix_caching=True,
        block_size=32,
        num_gpu_blocks_override=32,
        speculative={"branch_budget": 12},
    )
    try:
        run = engine.generate(requests, lockstep=1.0)
    finally:
        engine.close()
    assert texts(run) == texts(target_alone.generate(requests))
    assert run.counts["vllm:num_preemptions"] > 0, "inconclusive: nothing was preempted"
    assert run.counts["vllm:prefix_cache_hits"] > 0, "inconclusive: no prefix was cached"
    assert_conclusive(run, hits=100, misses=20, accepted=100)


@pytest.fixture(scope="module")
def small_drafter(start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """A drafter that takes at most 128 tokens a request and has 32 pages of 32 tokens for all of them."""
    engine = start_engine(speculative={"branch_budget": 12, "max_model_len": 128, "kv_cache_memory": "2MiB"})
    yield engine
    engine.close()


def test_prompts_too_long_for_the_drafter(small_drafter: Engine, target_alone: Engine, prompts: Prompts) -> None:
    requests = [request(prompt, max_tokens=40) for prompt in prompts(8, 130, 300, seed=10)]
    run = small_drafter.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate(requests))
    assert run.counts["vllm:generation_tokens"] == 8 * 40
    assert run.counts["hits"] == 0, "the drafter cannot hold them: whatever was drafted came from n-grams"


def test_requests_that_outgrow_the_drafter(small_drafter: Engine, target_alone: Engine, prompts: Prompts) -> None:
    requests = [request(prompt, max_tokens=150) for prompt in prompts(2, 20, 40, seed=11)]
    run = small_drafter.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate(requests))
    assert_conclusive(run, hits=5, accepted=5)


def test_drafter_out_of_pages(small_drafter: Engine, target_alone: Engine, prompts: Prompts) -> None:
    requests = [request(prompt, max_tokens=70, join_step=2 * i) for i, prompt in enumerate(prompts(24, 4, 50, seed=12))]
    run = small_drafter.generate(requests, lockstep=1.0)
    assert texts(run) == texts(target_alone.generate(requests))
    assert run.counts["evictions"] > 0, "inconclusive: nothing was evicted"
    assert_conclusive(run, hits=10, accepted=10)
