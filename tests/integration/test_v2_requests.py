"""Requests on vLLM's V2 model runner, asynchronously scheduled: greedy text is that of the target alone.

Whatever happens, the host reads no device tensor to draft. Triton's interpreter makes a round some fifty times slower
than the V1 runner's on a CPU: runs are short, and every block is there in time.
"""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import FORKED_WORKERS, ON_V2, Engine, assert_conclusive, cached_tokens, request, texts
from hashed_noise import gumbel_noise
from host_reads import HostReads
from marks import needs_v2

from vllm_ssd.link.protocol import HASHED_NOISE

Prompts = Callable[..., list[list[int]]]

HANG_S = 3.0
RESTART_S = 90.0
CODE = r"def [a-z_]{3,8}\(self, [a-z]{1,8}\):\n    return [a-z]{1,8}\n"


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    engine = start_engine(
        speculative={"branch_budget": 12, "adaptive": True, "on_miss": "skip"},
        patches={"vllm_ssd.link.process.HANG_S": HANG_S, "vllm_ssd.link.process.BACKOFF_S": (0.2, 1.0)},
        environment=ON_V2,
    )
    assert engine.call("is_async")
    launched = engine.call("launched_at_start")
    assert {"_lookup_kernel", "_write_draft_logits_kernel"} <= set(launched), "the first request waits for compilers"
    engine.call("set_drafts", counts=[5])  # a round takes longer or shorter with the interpreter's mood
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests(prompts: Prompts) -> list[dict[str, Any]]:
    """Requests of many lengths that keep joining a batch of eight while others leave it."""
    rng = random.Random(1)
    return [
        request(prompt, max_tokens=rng.randint(1, 60), join_step=2 * i) for i, prompt in enumerate(prompts(12, 2, 100))
    ]


def assert_same(run: SimpleNamespace, expected: SimpleNamespace, **conclusive: int) -> None:
    assert texts(run) == texts(expected)
    assert_is_light(run)
    assert_conclusive(run, **conclusive)


def assert_is_light(run: SimpleNamespace, ngram: bool = False) -> None:
    """A step reads nothing, launches one kernel to draft, one more if a request samples, and two ops to verify.

    With `ngram`, vLLM's own two kernels match n-grams in steps that are to have such drafts.
    """
    counts = run.counts
    matched = counts["launch _ngram_scan_kernel"] if ngram else 0
    assert bool(matched) == ngram and matched <= counts["proposals"]
    assert counts["host_reads"] == 0, "the host waited for the device"
    assert counts["proposals"] >= counts["verifications"] > 0
    expected = {
        "_lookup_kernel": counts["proposals"],
        "_write_draft_logits_kernel": counts["sampled_proposals"],
        "_ngram_scan_kernel": matched,
        "_ngram_finalize_kernel": matched,
        "aten.index.Tensor": counts["verifications"],
        "aten.gt.Tensor": counts["verifications"],
    }
    launched = {name.removeprefix("launch "): n for name, n in counts.items() if name.startswith("launch ") and n}
    assert launched == {name: n for name, n in expected.items() if n}


@needs_v2
@pytest.mark.compat
def test_text_is_that_of_the_target_alone(engine: Engine, target_alone: Engine, requests: list[dict[str, Any]]) -> None:
    run, expected = engine.generate(requests), target_alone.generate(requests)
    assert_same(run, expected, hits=50, misses=5, accepted=50)
    assert len(run.seconds) < len(expected.seconds), "inconclusive: speculation saved no round"


def test_the_number_of_drafts_changes(engine: Engine, target_alone: Engine, requests: list[dict[str, Any]]) -> None:
    """Between all and none, for requests that decode and requests that join meanwhile."""
    some = requests[:5]
    engine.call("set_drafts", counts=[5] * 6 + [0] * 6 + [2] * 6 + [0] * 2)
    try:
        run = engine.generate(some)
    finally:
        engine.call("set_drafts", counts=[5])
    assert_same(run, target_alone.generate(some), hits=5, accepted=10)
    learned = engine.call("drafts_learned")
    assert {0, 2, 5} <= learned.keys() and learned[0] >= 3, f"inconclusive: {learned}"


def test_sampling_parameters_and_greedy_rows_beside_sampled_ones(
    engine: Engine, target_alone: Engine, prompts: Prompts
) -> None:
    params = [
        {"regex": CODE, "ignore_eos": False},  # drafts are copied to the host, checked and cut
        {"temperature": 0.8, "top_p": 0.9},
        {"repetition_penalty": 1.3, "min_tokens": 10},
        {"stop": ["\n\n", "return"]},
        {"abort_after": 9},
        {"temperature": 0.7, "n": 2, "seed": 1},
        {"allowed_token_ids": list(range(40, 70)), "logit_bias": {45: 2.0}},
    ]
    requests = [
        request(prompt, max_tokens=40, **params[i]) for i, prompt in enumerate(prompts(len(params), 20, 60, seed=2))
    ]
    run, expected = engine.generate(requests), target_alone.generate([r | {"abort_after": None} for r in requests])
    for i, ((tokens, *_), (plain, *_)) in enumerate(zip(texts(run), texts(expected))):
        if requests[i]["params"]["temperature"] == 0:
            assert tokens == (plain[: len(tokens)] if requests[i]["abort_after"] else plain), params[i]
    assert re.fullmatch(CODE, run.outputs[0].samples[0].text)
    assert_is_light(run)
    assert run.counts["sampled_proposals"] > 0
    assert run.counts["known_q"] >= 20, f"inconclusive: {run.counts}"
    assert_conclusive(run, hits=20, accepted=20)


@needs_v2
@pytest.mark.compat
@pytest.mark.parametrize("num_drafts", [0, 1])
def test_tokens_are_drawn_with_the_noise_that_the_drafter_is_told(
    engine: Engine, prompts: Prompts, num_drafts: int
) -> None:
    """The token that wins with it is emitted where no draft is verified, and after drafts that were all accepted."""
    sampling = [{"temperature": 1.0, "seed": -3}, {"temperature": 0.7, "top_k": 50}, {"temperature": 0.4}]
    sampled = [
        request(prompt, max_tokens=40, logprobs=20, abort_after=100, **params)
        for prompt, params in zip(prompts(3, 5, 30, seed=37), sampling)
    ]
    engine.call("noises")
    engine.call("set_drafts", counts=[num_drafts])
    try:
        run = engine.generate(sampled, lockstep=1.0)
    finally:
        engine.call("set_drafts", counts=[5])
    noises = engine.call("noises")
    assert [noise.kind for noise in noises] == 3 * [HASHED_NOISE] and noises[0].seed == -3
    num_drawn = 0
    for asked, output, noise in zip(sampled, run.outputs, noises):
        sample, temperature = output.samples[0], asked["params"]["temperature"]
        for before, after in zip([0, *output.rounds], output.rounds):
            if num_drafts and after - before <= num_drafts:
                continue
            position, token_id = len(asked["prompt"]) + after - 2, sample.token_ids[after - 1]
            token_ids, logprobs = (np.array(list(one)) for one in zip(*sample.logprobs[after - 1].items()))
            drawn = token_ids[(logprobs / temperature + gumbel_noise(noise.seed, position, token_ids)).argmax()]
            assert drawn == token_id, (noise, position)
            num_drawn += 1
    assert num_drawn >= (10 if num_drafts else 120), f"inconclusive: {num_drawn}"


def test_a_prompt_of_another_salt_is_read_anew(engine: Engine, prompts: Prompts) -> None:
    prompt, other = prompts(2, 70, 70, seed=36)
    assert cached_tokens(engine, prompt, ["mine", "yours", "mine"], other) == 64


@needs_v2
@pytest.mark.parametrize(
    "ends_by",
    [
        pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.compat),
        pytest.param(signal.SIGSTOP, id="hung"),
    ],
)
def test_drafter_dies(
    engine: Engine, target_alone: Engine, requests: list[dict[str, Any]], ends_by: signal.Signals
) -> None:
    """The text stays, the drafter comes back, hits resume."""
    assert engine.call("wait_for_drafter", generation=1, timeout_s=RESTART_S)
    before = engine.call("drafter")
    some = requests[:6]
    expected = target_alone.generate(some)
    run = engine.generate(some, signals={8: ends_by})
    assert texts(run) == texts(expected)
    assert engine.call("wait_for_drafter", generation=before.generation + 1, timeout_s=RESTART_S)
    assert engine.call("drafter").pid != before.pid
    assert_same(engine.generate(some), expected, hits=20, accepted=20)


def test_chunked_prefill_preemption_and_ngram(
    start_engine: Callable[..., Engine], target_alone: Engine, corpus: list[int]
) -> None:
    """A target whose KV holds only part of what it was given: requests leave their slots and return as new ones."""
    rng = random.Random(9)
    requests = []
    for i in range(8):
        prefix = corpus[(start := 1000 * (i % 2)) : start + 40]
        rest = corpus[(start := rng.randrange(len(corpus) - 100)) : start + rng.randint(1, 60)]
        requests.append(request(prefix + rest, max_tokens=rng.randint(30, 60), join_step=i))
    engine = start_engine(
        max_model_len=256,
        max_num_batched_tokens=64,
        enable_prefix_caching=True,
        block_size=32,
        num_gpu_blocks_override=12,
        speculative={"branch_budget": 12, "on_miss": "auto"},
        environment=ON_V2,
    )
    try:
        run = engine.generate(requests)
    finally:
        engine.close()
    assert texts(run) == texts(target_alone.generate(requests))
    assert run.counts["vllm:num_preemptions"] > 0, "inconclusive: nothing was preempted"
    assert_is_light(run, ngram=True)
    assert_conclusive(run, hits=20, misses=5, accepted=30)


@pytest.mark.parametrize("parallelism", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_workers(
    start_engine: Callable[..., Engine], target_alone: Engine, prompts: Prompts, parallelism: str
) -> None:
    """One of them has the drafter. Of two pipeline stages each has a batch at a time; rounds carry drafts or none."""
    greedy = [request(prompt, max_tokens=24, join_step=i) for i, prompt in enumerate(prompts(3, 10, 60, seed=40))]
    sampled = request(greedy[0]["prompt"], max_tokens=24, temperature=0.8)
    engine = start_engine(
        max_model_len=256,
        speculative={"branch_budget": 12, "adaptive": True},
        environment=ON_V2,
        patches=FORKED_WORKERS,
        **{parallelism: 2},
    )
    try:
        engine.call("set_drafts", counts=[5] * 6 + [0] * 3)
        run = engine.generate([*greedy, sampled])
        learned = engine.call("drafts_learned")
    finally:
        engine.close()
    assert texts(run)[:3] == texts(target_alone.generate(greedy))
    assert len(texts(run)[3][0]) == 24
    assert_conclusive(run, accepted=20)
    assert {0, 5} <= learned.keys(), f"inconclusive: {learned}"


def test_the_watch_sees_host_reads() -> None:
    import torch

    tensor = torch.arange(3)
    with HostReads() as reads:
        _ = int(tensor[0]), tensor.tolist(), tensor[tensor > 0], bool(tensor.any()), tensor.numpy(), f"{tensor[1]}"
    assert len(reads.found) >= 6, reads.found
    with HostReads() as reads:
        _ = torch.where(tensor > 1, tensor, 0)[tensor] + tensor.max()
    assert not reads.found
