"""Requests that drafts can do nothing for are left alone, and images and embeddings are told of once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_ssd.compat.target import gain, runner_v1
from vllm_ssd.compat.target.gain import can_gain, ending_requests, last_length
from vllm_ssd.compat.target.seeded_rounds import SeededRounds


def new(max_tokens: int | None = 100, structured: StructuredOutputsParams | None = None, **fields) -> SimpleNamespace:
    params = SamplingParams(max_tokens=max_tokens, structured_outputs=structured)
    defaults = {"prompt_token_ids": [1, 2, 3], "prefill_token_ids": None, "mm_features": [], "prompt_embeds": None}
    return SimpleNamespace(**{"req_id": "a", "sampling_params": params} | defaults | fields)


def config(reasoning_parser: str = "") -> SimpleNamespace:
    return SimpleNamespace(structured_outputs_config=SimpleNamespace(reasoning_parser=reasoning_parser))


@pytest.mark.parametrize(("max_tokens", "gains"), [(1, False), (2, False), (3, True), (100, True), (None, True)])
def test_the_first_token_comes_from_the_prompt_and_a_draft_needs_two_more(max_tokens, gains):
    assert can_gain(new(max_tokens), config()) == gains
    assert last_length(new(max_tokens)) == (max_tokens and 3 + max_tokens)


def test_what_was_emitted_before_a_preemption_counts():
    assert can_gain(new(10, prefill_token_ids=[1, 2, 3] + [4] * 7), config())
    assert not can_gain(new(10, prefill_token_ids=[1, 2, 3] + [4] * 8), config())


@pytest.mark.parametrize(
    ("structured", "gains"),
    [
        ({"choice": ["yes", "no"]}, False),
        ({"grammar": 'root ::= "positive" | "negative" | "neutral"'}, False),  # what vLLM makes of choices
        ({"grammar": 'root ::= "A"'}, False),
        ({"choice": ["yes", "no, because of what was said before"]}, True),
        ({"grammar": 'root ::= "yes" | "no, because of what was said before"'}, True),
        ({"grammar": 'root ::= "A" | rest\nrest ::= "B" rest'}, True),
        ({"grammar": 'root ::= ("A" | "B")+'}, True),
        ({"regex": "A|B"}, True),
        ({"json": {"type": "object"}}, True),
    ],
)
def test_one_of_a_few_short_texts(structured, gains):
    request = new(structured=StructuredOutputsParams(**structured))
    assert can_gain(request, config()) == gains
    assert can_gain(request, config("qwen3")), "its reasoning comes first, and is as long as any"


def test_prompts_of_more_than_token_ids_are_told_of_once(monkeypatch, caplog):
    monkeypatch.setattr(gain, "_told", False)
    monkeypatch.setattr(gain.logger, "propagate", True)
    others = [{"mm_features": ["image"]}, {"prompt_embeds": object()}, {"prompt_token_ids": None}]
    for i, fields in enumerate(others):
        assert not can_gain(new(req_id=f"r{i}", **fields), config())
    assert [record.message.split(":")[1] for record in caplog.records] == [" request r0 runs without drafts"]


def test_v1_requests_join_if_they_can_gain_and_leave_when_one_token_is_left():
    told, scheduled, finished = [], [new(req_id="short", max_tokens=1), new(req_id="long")], []
    proposer = SimpleNamespace(
        on_schedule=lambda started, finished: told.append(([r[0] for r in started], list(finished))),
        on_rows=lambda *rows: told.append(rows),
        seeded_rounds=SeededRounds(),
    )
    rows = {"long": (3, 90, 100), "last but one": (3, 8, 10), "last": (5, 9, 10), "unbounded": (1, 50, None)}
    batch = SimpleNamespace(
        req_ids=list(rows),
        num_prompt_tokens=np.array([prompt for prompt, _, _ in rows.values()] + [0]),
        num_tokens_no_spec=np.array([prompt + emitted for prompt, emitted, _ in rows.values()] + [0]),
    )
    requests = {name: SimpleNamespace(sampling_params=new(limit).sampling_params) for name, (*_, limit) in rows.items()}
    runner = SimpleNamespace(input_batch=batch, requests=requests, vllm_config=config())
    output = SimpleNamespace(
        scheduled_new_reqs=scheduled, finished_req_ids=finished, scheduled_spec_decode_tokens={"long": [1, 2]}
    )
    runner_v1._execute_model(lambda output: None, runner, proposer, output)
    runner_v1._propose_draft_token_ids(lambda output: None, runner, proposer, output)
    assert told == [(["long"], []), ([], ["last"]), (list(rows), [2, 0, 0, 0])]
    assert ending_requests(runner, []) == []
