"""Outcomes of several rounds as one are to the drafter what each of them would have been."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

import pytest
from engine_target import K, Target, grow

from vllm_ssd.drafter.merging import MAX_MERGED_STEPS, MergedOutcome, merge_backlog, merged
from vllm_ssd.drafter.server import apply
from vllm_ssd.link.protocol import Close, Hello, Open, Outcome, Step, pack_ids

MANY = 100


def outcome(name: str, length: int, emitted: list[int], drafts: list[int] | None = None, jit: int = 0) -> Outcome:
    return Outcome(name, 1, length, emitted, drafts or [], jit)


def test_the_last_drafts_and_all_tokens_are_kept() -> None:
    first = merged(outcome("a", 7, [1, 2], [3]), outcome("a", 8, [4], [5, 6]))
    assert first == MergedOutcome("a", 1, 8, [1, 2, 4], [5, 6], rounds=(2, 1))
    assert merged(first, outcome("a", 9, [7], [], 3)) == MergedOutcome("a", 1, 9, [1, 2, 4, 7], [], 3, (2, 1, 1))
    assert merged(outcome("a", 8, [4], [], 3), outcome("a", 8, [], [5])).rounds == (1, 0), "drafts that were named late"


def test_a_backlog_is_one_step_with_the_drafts_that_are_wanted_last() -> None:
    heard = [Step([outcome("a", 6, [1]), outcome("b", 6, [1])], 5)]
    behind = deque([Step([outcome("b", 7, [2]), outcome("a", 8, [2, 3])], 4), Step([outcome("a", 9, [4], [7])], 3)])
    steps, num_heard = merge_backlog(heard, behind, MANY)
    assert steps == [
        Step([MergedOutcome("b", 1, 7, [1, 2], [], rounds=(1, 1))], 4),
        Step([MergedOutcome("a", 1, 9, [1, 2, 3, 4], [7], rounds=(1, 2, 1))], 3),
    ]
    assert num_heard == 2 and not behind


@pytest.mark.parametrize(
    "step",
    [
        Step([Outcome("a", 2, 7, [1], [])], K),
        Step([outcome("a", 9, [1])], K),
        Step([outcome("b", 7, [1])], K),
        Step([Close("a"), outcome("a", 7, [1])], K),
        Step([Open("a", 2, pack_ids([1]), 0.0), Outcome("a", 2, 2, [1], [])], K),
        Step([outcome("a", i, [1]) for i in range(7, 10)], K),
        Step([outcome("a", 7, [1])] * (MANY + 1), K),
        Hello(1, 13, K, ""),
    ],
    ids="epoch length stranger closed opened repeated long hello".split(),
)
def test_what_does_not_follow_waits(step: Step | Hello) -> None:
    heard = [Step([outcome("a", 6, [1])], K)]
    behind = deque([step])
    assert merge_backlog(heard, behind, MANY) == (heard, 0) and behind == deque([step])


def test_some_new_events_come_along_and_are_counted() -> None:
    heard = [Step([outcome(name, 6, [1]) for name in "abc"], K)]
    opened = Open("d", 1, pack_ids([1]), 0.0)
    behind = deque([Step([Close("a"), opened, *(outcome(name, 7, [1]) for name in "bc")], K)])
    steps, num_heard = merge_backlog(heard, behind, MANY)
    assert num_heard == 3 and not behind
    assert [type(event) for step in steps for event in step.events] == [
        *[Outcome, Close, Open],
        *[MergedOutcome] * 2,
    ]


def test_so_many_steps_are_merged_at_a_time() -> None:
    behind = deque(Step([outcome("a", 6 + i, [1])], K) for i in range(1, 20))
    (step,), num_heard = merge_backlog([Step([outcome("a", 6, [1])], K)], behind, MANY)
    assert num_heard == MAX_MERGED_STEPS == 19 - len(behind) and step.events[0].length == 6 + MAX_MERGED_STEPS


def rounds_of(target: Target, rng: Random) -> list[tuple[list[int], list[int]]]:
    """Two outcomes in a row: emitted tokens and drafts of each, hits as often as misses."""
    drafts, found = target.drafts["a"], []
    for _ in range(2):
        accept_length = rng.randint(0, len(drafts))
        blocks = [(bonus, following) for (k, bonus), following in target.blocks["a"].items() if k == accept_length]
        bonus, following = rng.choice(blocks) if blocks and rng.random() < 0.7 else (rng.randrange(13), [])
        emitted = [*drafts[:accept_length], bonus]
        drafts = following or [rng.randrange(13) for _ in range(rng.randint(0, K))]
        found.append((emitted, drafts))
    return found


def test_two_rounds_merged_leave_the_engine_where_each_by_itself_does(make_target: Callable[..., Target]) -> None:
    rng = Random(0)
    single, both = make_target(), make_target()
    for target in (single, both):
        target.engine._budget.observe_window = lambda seconds: None  # trees as wide as may be, however fast this is
        target.open("a", [1, 2, 3, 4, 5])
        grow(target)
    for _ in range(15):
        events = []
        for emitted, drafts in rounds_of(single, rng):
            single.advance("a", emitted, drafts)
            both.tokens["a"] += emitted
            events.append(outcome("a", len(both.tokens["a"]), emitted, drafts))
        both.drafts["a"], both.blocks["a"] = drafts, {}
        apply(both.engine, merged(*events), K)
        one, other = single.engine.sequences["a"], both.engine.sequences["a"]
        assert (one.tokens, one.length, one.computed) == (other.tokens, other.length, other.computed)
        grow(single)
        grow(both)  # and what it pushes then is what the model says
        assert set(single.blocks["a"]) == set(both.blocks["a"])


def test_a_window_is_that_of_one_round_and_the_first_is_learned_from(
    make_target: Callable[..., Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target()
    engine, clock = target.engine, [100.0]
    windows: list[float] = []
    observed: list[tuple[int, int]] = []
    monkeypatch.setattr("vllm_ssd.drafter.engine.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(engine._budget, "observe_window", windows.append)
    monkeypatch.setattr(engine._outcomes, "observe", lambda sequence, k, token: observed.append((k, token)))
    target.open("a", [1, 2, 3])
    engine.advance("a", 1, 4, [7], [8, 9], num_drafts=K)
    engine.speculate()
    clock[0] += 6.0
    three = merged(merged(outcome("a", 6, [8, 5], [1]), outcome("a", 7, [2], [], 3)), outcome("a", 7, [], [4]))
    apply(engine, merged(three, outcome("a", 8, [6])), K)
    engine.speculate()
    assert windows == [2.0], "of three rounds, one of which only named its drafts late"
    assert observed == [(0, 7), (1, 5)]
