"""What users ask of a server beside sampling: with SSD, text and logprobs are those of the target alone.

One target, whose KV pool holds one request of full length, with priorities, a reasoning parser, prompt embeddings,
prefix caching and prompts in pieces. On the V2 runner, which is slow under Triton's interpreter, requests are fewer and
shorter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import ON_V2, Engine, assert_conclusive, assert_counts_agree, request, texts
from marks import needs_v2
from random_requests import WITH_REASONING, same_logprobs

Prompts = Callable[..., list[list[int]]]

MARKERS = (316, 1989)
"""Token ids that start and end reasoning: "def" and "return"."""
PAGE = 32
FEATURES: dict[str, Any] = {
    **WITH_REASONING,
    "block_size": PAGE,
    "num_gpu_blocks_override": 512 // PAGE + 1,  # vLLM keeps one for itself
    "scheduling_policy": "priority",
    "enable_prefix_caching": True,
    "enable_prompt_embeds": True,
    "max_num_batched_tokens": 64,
}
ANSWER = r"[0-9]{3}-[a-z]{2,8}\."
"""What structured outputs are to match."""


@pytest.fixture(
    scope="module",
    params=["V1", pytest.param("V2", marks=needs_v2)],
)
def engine(request: pytest.FixtureRequest, start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    environment = ON_V2 if request.param == "V2" else {}
    engine = start_engine(speculative={"branch_budget": 12}, environment=environment, **FEATURES)
    yield engine
    engine.close()


@pytest.fixture
def few(engine: Engine) -> Callable[[int], int]:
    """As many requests or tokens as the runner has time for."""
    return lambda number: max(number // 3, 2) if engine.on_v2 else number


@pytest.fixture(scope="module")
def reference(start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    """The target alone with the same features."""
    patches = FEATURES["patches"] | {"stock_repairs.REPAIRED": True}
    engine = start_engine(**FEATURES | {"patches": patches})
    yield engine
    engine.close()


def compare(
    engine: Engine, reference: Engine, requests: list[dict[str, Any]], calls: dict[int, tuple[str, Any]] | None = None
) -> SimpleNamespace:
    """Run `requests` with SSD, with `calls` of the engine meanwhile, and without both; the texts are the same.

    On V2, a round that such a call interrupts may be counted by vLLM alone, or by SSD.
    """
    run, expected = engine.generate(requests, lockstep=1.0, calls=calls), reference.generate(requests)
    assert texts(run) == texts(expected)
    for output, plain in zip(run.outputs, expected.outputs):
        assert [sample.finish_reason for sample in output.samples] == [s.finish_reason for s in plain.samples]
        assert len(output.prompt_logprobs) == len(plain.prompt_logprobs)
        assert all(map(same_logprobs, output.prompt_logprobs, plain.prompt_logprobs))
        assert all(map(same_logprobs, output.samples[0].logprobs, plain.samples[0].logprobs))
    if engine.on_v2 and calls:
        assert run.counts["hits"] >= 2 and run.counts["accepted_tokens"] >= 4, f"inconclusive: {run.counts}"
    else:
        assert_conclusive(run, hits=2 if engine.on_v2 else 5, accepted=4 if engine.on_v2 else 10)
    return run


def test_structure_begins_where_reasoning_ends(
    engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]
) -> None:
    """The budget ends reasoning at every place of a round, and the token after the end is the grammar's first."""
    requests = [
        request([*prompt, MARKERS[0]], max_tokens=60, thinking_token_budget=i, regex=ANSWER, ignore_eos=False)
        for i, prompt in enumerate(prompts(few(10), 20, 40, seed=80))
    ]
    run = compare(engine, reference, requests)
    ends = [tokens.index(MARKERS[1]) for (tokens,) in texts(run)]
    assert ends == list(range(few(10)))
    for output in run.outputs:
        assert re.search(rf"return{ANSWER}\Z", output.samples[0].text), output.samples[0].text


def test_prompt_logprobs_of_prompts_in_pieces(
    engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]
) -> None:
    requests = [
        request(prompt, max_tokens=few(30), prompt_logprobs=i % 3, logprobs=2, join_step=2 * i)
        for i, prompt in enumerate(prompts(few(4), 70, 150, seed=81))
    ]
    run = compare(engine, reference, requests)
    assert [len(output.prompt_logprobs) for output in run.outputs] == [len(r["prompt"]) - 1 for r in requests]


def test_prompt_embeddings_beside_tokens(
    engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]
) -> None:
    """The embeddings are those of tokens, so the text is what the tokens give."""
    as_tokens = [
        request(prompt, max_tokens=few(30), join_step=i) for i, prompt in enumerate(prompts(few(6), 20, 60, seed=82))
    ]
    mixed = [asked | {"embedded": i % 2 == 0} for i, asked in enumerate(as_tokens)]
    compare(engine, reference, mixed)
    assert texts(reference.generate(mixed)) == texts(reference.generate(as_tokens))


def test_the_prefix_cache_is_reset_while_requests_run(
    engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]
) -> None:
    """With `reset_running_requests` they are preempted, and prefilled again."""
    requests = [request(prompt, max_tokens=50) for prompt in prompts(few(4), 20, 60, seed=83)]
    reset = ("reset_prefix_cache", {"reset_running_requests": True})
    run = compare(engine, reference, requests, calls={6: reset, 9: reset, 14: ("reset_prefix_cache", {})})
    assert run.counts["vllm:num_preemptions"] >= few(4), "inconclusive: nothing was preempted"


def test_the_urgent_preempt_the_others_of_a_pool_that_holds_one(
    engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]
) -> None:
    requests = [
        request(prompt, max_tokens=few(150), join_step=6 * i, priority=-i)
        for i, prompt in enumerate(prompts(few(5), 150, 300, seed=84))
    ]
    run = compare(engine, reference, requests)
    assert run.counts["vllm:num_preemptions"] > 0, "inconclusive: nothing was preempted"


def test_seeds_beside_none(engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]) -> None:
    """Prompts that fit into one piece: vLLM's CPU runner has no seeds beside pieces."""
    requests = [
        request(prompt, max_tokens=30, join_step=4 * i, **({"temperature": 0.9, "seed": i} if i % 2 else {}))
        for i, prompt in enumerate(prompts(few(8), 10, 14, seed=85))
    ]
    run, expected = engine.generate(requests, lockstep=1.0), reference.generate(requests)
    assert texts(run)[::2] == texts(expected)[::2]
    assert all(len(tokens) == 30 for (tokens,) in texts(run))
    assert_conclusive(run, hits=5, accepted=10)


def test_sleep_and_wake(engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]) -> None:
    """Requests that run when the engine is put to sleep go on when it wakes."""
    requests = [request(prompt, max_tokens=few(50)) for prompt in prompts(few(4), 20, 40, seed=86)]
    compare(
        engine, reference, requests, calls={8: ("sleep", {"level": 0, "mode": "keep"}), 14: ("wake_up", {"tags": None})}
    )


def test_beam_search(engine: Engine, reference: Engine, prompts: Prompts) -> None:
    """Each beam is a request of one token, which has no room for drafts: they must not disturb it."""
    asked = {"prompts": prompts(2, 20, 40, seed=87), "width": 3, "max_tokens": 8}
    before = engine.call("counts")
    assert engine.call("beam_search", **asked) == reference.call("beam_search", **asked)
    counts = {name: value - before.get(name, 0) for name, value in engine.call("counts").items()}
    assert_counts_agree(SimpleNamespace(counts=counts))


def test_reloaded_weights(engine: Engine, reference: Engine, prompts: Prompts, few: Callable[[int], int]) -> None:
    requests = [
        request(prompt, max_tokens=few(40), join_step=i) for i, prompt in enumerate(prompts(few(4), 20, 60, seed=88))
    ]
    engine.call("call_engine", name="collective_rpc", arguments={"method": "reload_weights"})
    compare(engine, reference, requests)
    assert "drafter keeps the weights" in engine.log.read_text()


@pytest.mark.parametrize("runner", ["V1", pytest.param("V2", marks=needs_v2)])
def test_kv_from_a_connector(
    start_engine: Callable[..., Engine], target_alone: Engine, prompts: Prompts, tmp_path: Path, runner: str
) -> None:
    """Prompts whose KV another request left in shared storage: the drafter reads them, the target does not."""
    requests = [request(prompt, max_tokens=40 if runner == "V1" else 20) for prompt in prompts(3, 80, 150, seed=89)]
    engine = start_engine(
        speculative={"branch_budget": 12},
        block_size=PAGE,
        enable_prefix_caching=False,
        kv_transfer_config={
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
        environment=ON_V2 if runner == "V2" else {},
    )
    try:
        stored, loaded = (engine.generate(requests, lockstep=1.0) for _ in range(2))
    finally:
        engine.close()
    expected = texts(target_alone.generate(requests))
    assert texts(stored) == expected and texts(loaded) == expected
    assert [output.num_cached_tokens for output in loaded.outputs] != [0] * 3, "inconclusive: no KV was loaded"
    for run in (stored, loaded):
        assert_conclusive(run, hits=5, accepted=10)
