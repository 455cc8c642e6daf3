"""What a server is mostly asked for: chats that go on, and answers of a token beside long ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines import Engine, assert_conclusive, cached_tokens, request, texts

pytestmark = pytest.mark.timed

ROUND_S = 0.02
PAGE_SIZE = 32  # of the drafter on a CPU
TRIES = 3
"""To compare rates of a hundred rounds each, of which the machine may make any late."""


def test_a_chat_goes_on_where_it_ended(
    ssd_engine: Engine, target_alone: Engine, prompts: Callable[..., list[list[int]]]
) -> None:
    """Six turns: the drafter reads what is new and less than a page more, and hardly a block comes late."""
    ssd_engine.call("set_config", on_miss="skip")
    chat, *messages = prompts(1, 201, 201, seed=31) + prompts(6, 12, 12, seed=32)
    before, late, hits, opened = ssd_engine.call("counts"), [], 0, []
    for message in messages:
        chat = chat + message
        turn = [request(chat, max_tokens=24)]
        run = ssd_engine.generate(turn, min_seconds=ROUND_S)
        assert texts(run) == texts(target_alone.generate(turn))
        late.append(run.counts["late"])
        hits += run.counts["hits"]
        opened.append(len(chat))
        chat = chat + run.outputs[0].samples[0].token_ids
    counts = {name: value - before[name] for name, value in ssd_engine.call("counts").items()}
    prompt_tokens, cached_tokens = counts["drafter_prompt_tokens"], counts["drafter_cached_tokens"]
    assert hits >= 20 and prompt_tokens >= sum(opened[:-1]), "inconclusive: the drafter hardly drafted"
    assert prompt_tokens - cached_tokens <= 213 + 5 * (12 + 24 + PAGE_SIZE)
    assert sum(late[1:]) <= 2 * len(late[1:]), f"late rounds of each turn: {late}"


def test_a_prompt_of_another_salt_is_read_anew(ssd_engine: Engine, prompts: Callable[..., list[list[int]]]) -> None:
    """The drafter finds the pages of a prompt that was seen with the same `cache_salt`, and of no other."""
    prompt, other = prompts(2, 100, 100, seed=36)
    assert cached_tokens(ssd_engine, prompt, ["mine", "yours", "mine", None], other) == 100 // PAGE_SIZE * PAGE_SIZE


def test_requests_of_a_token_leave_a_long_one_its_hits(
    ssd_engine: Engine, target_alone: Engine, prompts: Callable[..., list[list[int]]]
) -> None:
    """Forty of them join one after the other beside a long one; the drafter hears of none."""
    ssd_engine.call("set_config", on_miss="skip")
    (prompt,) = prompts(1, 100, 100, seed=33)
    long = request(prompt, max_tokens=150)
    short = [request(p, max_tokens=1, join_step=i) for i, p in enumerate(prompts(30, 60, 120, seed=34))]
    choice = {"structured_outputs": {"choice": ["yes", "no"]}, "ignore_eos": False, "max_tokens": 20}
    short += [request(p, join_step=3 * i, **choice) for i, p in enumerate(prompts(10, 60, 120, seed=35))]
    expected = texts(target_alone.generate([long, *short]))
    for _ in range(TRIES):
        alone = ssd_engine.generate([long], min_seconds=ROUND_S)
        beside = ssd_engine.generate([long, *short], min_seconds=ROUND_S)
        after = ssd_engine.generate([long], min_seconds=ROUND_S)  # with it comes what the drafter last counted
        assert texts(beside) == expected
        assert {sample.text for output in beside.outputs[31:] for sample in output.samples} <= {"yes", "no"}
        for run in (alone, beside):
            assert_conclusive(run, hits=10, accepted=10)
        assert beside.counts["drafter_prompt_tokens"] + after.counts["drafter_prompt_tokens"] <= 3 * len(prompt)
        if hit_rate(beside) >= hit_rate(alone) - 0.1:
            return
    pytest.fail(
        f"hit rate {hit_rate(alone):.2f} alone and {hit_rate(beside):.2f} beside them, in the last of {TRIES} tries"
    )


def hit_rate(run) -> float:
    return run.counts["hits"] / sum(run.counts[name] for name in ("hits", "misses", "late"))
