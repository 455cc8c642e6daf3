"""What a target that floods a shared drafter leaves to another: the drafter's loop in simulated time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import fake_model
import msgspec
import pytest
from listening_drafter import HELLO, OPTIONS, SLOTS, WELCOME, K, engine_with
from test_tenants import LONGEST_STEP

from vllm_ssd.drafter.merging import MAX_MERGED_STEPS, MergedOutcome
from vllm_ssd.drafter.ration import Ration
from vllm_ssd.drafter.server import apply
from vllm_ssd.drafter.tenants import Tenant, Tenants
from vllm_ssd.link.protocol import Close, Open, Outcome, Push, Step, pack_ids

LOGGER = logging.getLogger("test_ration")
VOCAB_SIZE = fake_model.FakePagedModel.vocab_size
MESSAGE_S, EVENT_S, STEP_S, TOKEN_S = 5e-6, 40e-6, 400e-6, 4e-6
"""What the drafter's loop spends on each."""
ROUND_S, RUN_S = 8e-3, 0.5
MAX_MESSAGES = 1024
LONG = 1000


class Wire:
    """The drafter's end of a connection; `say` returns what its target says when it is read."""

    at_bound, pending_bytes = False, 0

    def __init__(self, say: Callable[[], list[Step]]) -> None:
        self.say = say
        self.num_messages = 0
        self.pushes: list[Push] = []

    def poll(self, timeout_s: float) -> list[Step]:
        steps = self.say()
        self.num_messages += len(steps)
        return steps

    def send(self, push: Push) -> None:
        self.pushes.append(push)

    def close(self) -> None: ...


class Nobody:
    """An acceptor without connections."""

    def take(self) -> list:
        return []


class Honest:
    """A target of some requests that all decide a round every ROUND_S, with no drafts under verification."""

    def __init__(self, num_requests: int) -> None:
        self.wire = Wire(self.say)
        self.texts = {str(i): [i, 1, 2] for i in range(num_requests)}
        self.hits = self.late = 0
        self.unsaid: list[Step] = [Step([Open(name, 1, pack_ids(text), 0.0) for name, text in self.texts.items()], K)]
        self.next_round_s = ROUND_S

    def say(self) -> list[Step]:
        steps, self.unsaid = self.unsaid, []
        return steps

    def advance(self, now: float) -> None:
        while now >= self.next_round_s:
            self.next_round_s += ROUND_S
            blocks = {(b.request_id, b.length) for push in self.wire.pushes for b in push.blocks}
            self.wire.pushes.clear()
            events = []
            for name, text in self.texts.items():
                is_late = (name, len(text)) not in blocks
                self.late += is_late
                self.hits += not is_late
                text.append(int(fake_model.reference_logits(text).argmax()))
                events.append(Outcome(name, 1, len(text), text[-1:], []))
            self.unsaid.append(Step(events, K))


def prompts(length: int) -> Iterator[Step]:
    """A new request at once after the other, of a text that nobody has read."""
    epoch = 0
    while True:
        epoch += 1
        ids = [epoch * 7 % VOCAB_SIZE, *(((i * epoch) >> 3) % VOCAB_SIZE for i in range(1, length))]
        yield Step([Open(f"{epoch % SLOTS}", epoch, pack_ids(ids), 0.0)], K)


def outcomes() -> Iterator[Step]:
    """Rounds of all its requests without an end."""
    while True:
        names = [str(i) for i in range(SLOTS // 2)]
        yield Step([Open(name, 1, pack_ids([1]), 0.0) for name in names], K)
        for length in range(2, 150):
            yield Step([Outcome(name, 1, length, [length % VOCAB_SIZE], []) for name in names], K)


def strangers() -> Iterator[Step]:
    """Outcomes of requests that it never opened."""
    number = 0
    while True:
        number += 1
        yield Step([Outcome(f"{number}-{i}", 1, 5, [1], []) for i in range(8)], K)


def echoes() -> Iterator[Step]:
    """Many outcomes of one request in each message."""
    length = 1
    yield Step([Open("0", 1, pack_ids([1]), 0.0)], K)
    while True:
        yield Step([Outcome("0", 1, length + i, [1], []) for i in range(1, 51)], K)
        length += 50


def hits(flood: Iterator[Step] | None) -> float:
    """The share of an honest target's rounds that find a block, with or without another one beside it."""
    model = fake_model.FakePagedModel(4000, max_model_len=LONG + 100)
    engine = engine_with(OPTIONS, model)
    tenants = Tenants(Nobody(), OPTIONS, lambda hello: WELCOME, LONGEST_STEP, LOGGER)
    honest = Honest(SLOTS // 2)
    wires = [honest.wire]
    if flood is not None:
        wires.append(Wire(lambda: [next(flood) for _ in range(MAX_MESSAGES)]))
    for number, wire in enumerate(wires):
        tenant = Tenant(number, "", wire, 0.0, HELLO)
        tenant.ration = Ration(SLOTS + 1)
        tenants._tenants[number] = tenant
    now = 0.0
    while now < RUN_S:
        before = sum(wire.num_messages for wire in wires)
        steps = tenants.poll(0.0)
        now += MESSAGE_S * (1 + sum(wire.num_messages for wire in wires) - before)
        for step in steps:
            for event in step.events:
                apply(engine, event, step.num_speculative_tokens)
                now += EVENT_S
        tokens = model.num_tokens
        push = engine.speculate() if engine.has_work else None
        now += STEP_S + TOKEN_S * (model.num_tokens - tokens)
        honest.advance(now)
        if push is not None:
            tenants.send(push)
        if len(wires) > 1:
            wires[1].pushes.clear()
    os.close(tenants._stop)
    return honest.hits / (honest.hits + honest.late)


@pytest.fixture(scope="module")
def alone() -> float:
    share = hits(None)
    assert share > 0.95, f"inconclusive: {share}"
    return share


FLOODS = [lambda: prompts(8), lambda: prompts(LONG), outcomes, strangers, echoes]


@pytest.mark.parametrize("flood", FLOODS, ids=["opens", "prompts", "outcomes", "strangers", "echoes"])
def test_a_flood_leaves_the_other_its_hits(alone: float, flood: Callable[[], Iterator[Step]]) -> None:
    assert hits(flood()) >= 0.9 * alone


def test_without_rations_it_would_not(alone: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tenants, "_is_shared", lambda self, tenant: False)
    assert hits(strangers()) < 0.5 * alone


def opening(name: str, length: int, epoch: int = 1) -> Open:
    return Open(name, epoch, pack_ids([1] * length), 0.0)


def test_what_follows_an_open_waits_with_it_in_one_outcome() -> None:
    ration = Ration(1)
    assert ration.keep(opening("a", 10), K, is_shared=True)
    assert ration.keep(Outcome("a", 1, 12, [5, 6], [7], 2), K, is_shared=False)
    assert ration.keep(Outcome("a", 1, 13, [8], [9, 9]), 2, is_shared=True)
    assert not ration.keep(Outcome("b", 1, 13, [8], []), K, is_shared=True), "another request is not held up"
    assert not ration.keep(Outcome("a", 0, 13, [8], []), K, is_shared=True), "it is about an earlier opening"
    (first,) = ration.grant(10)
    assert first.opened == opening("a", 10) and first.num_drafts == 2
    assert first.outcome == MergedOutcome("a", 1, 13, [5, 6, 8], [9, 9], rounds=(2, 1))
    assert not ration.keep(Outcome("a", 1, 14, [1], []), K, is_shared=True)


def test_prompts_have_their_turn_and_those_that_have_ended_have_none() -> None:
    ration = Ration(1)
    for name, length in (("a", 10), ("b", 30), ("c", 10)):
        ration.keep(opening(name, length), K, is_shared=True)
    assert not ration.keep(Close("c"), K, is_shared=True)
    assert [one.opened.request_id for one in ration.grant(25)] == ["a"]
    assert [one.opened.request_id for one in ration.grant(10)] == []
    ration.keep(opening("b", 20, epoch=2), K, is_shared=True)
    assert [one.opened.epoch for one in ration.grant(0)] == [2]
    ration.keep(opening("d", 10), K, is_shared=True)
    assert not list(ration.grant(9)), "what was saved is gone when nothing waits"


def test_one_target_alone_is_not_rationed() -> None:
    tenants = Tenants(Nobody(), OPTIONS, lambda hello: WELCOME, LONGEST_STEP, LOGGER)
    names = [str(i) for i in range(SLOTS)]
    said = [Step([opening(name, LONG) for name in names], K)]
    said += [Step([Outcome(name, 1, LONG + i, [1], []) for name in names], K) for i in range(1, 100)]
    tenants._tenants[0] = Tenant(0, "", Wire(lambda: said), 0.0, HELLO, ration=Ration(1))
    assert sum(len(step.events) for step in tenants.poll(0.0)) == 100 * SLOTS
    os.close(tenants._stop)


class Steady:
    """A target that says rounds of all its requests, so many whenever it is read; follows what is heard of them.

    life: rounds after which a request leaves and another one comes, of one request at a time
    """

    def __init__(self, rounds: int, life: int = 0) -> None:
        self.rounds, self.life = rounds, life
        self.round = 0
        self.said = {str(i): 5 for i in range(SLOTS)}
        self.unsaid = [Step([opening(name, 5) for name in self.said], K)]
        self.heard: dict[str, int] = {}
        self.num_events = 0
        self.next_name = SLOTS

    def say(self) -> list[Step]:
        steps, self.unsaid = self.unsaid, []
        return steps

    def advance(self) -> None:
        for _ in range(self.rounds):
            events: list[Open | Outcome | Close] = []
            self.round += 1
            leaves = self.life and self.round % (self.life // SLOTS) == 0
            if leaves:
                first = next(iter(self.said))
                del self.said[first]
                events = [Close(first), opening(str(self.next_name), 5)]
            for name in self.said:
                self.said[name] += 2
                events.append(Outcome(name, 1, self.said[name], [1, 2], []))
            if leaves:
                self.said[str(self.next_name)] = 5
                self.next_name += 1
            self.unsaid.append(Step(events, K))

    def hear(self, name: str, event: Open | Outcome | Close) -> None:
        self.num_events += 1
        if isinstance(event, Open):
            self.heard[name] = len(event.token_ids) // 4
        elif isinstance(event, Close):
            self.heard.pop(name, None)
        else:
            self.heard[name] += len(event.emitted)
            assert self.heard[name] == event.length, "tokens were lost"

    @property
    def behind(self) -> int:
        """Rounds that the drafter has not heard of, of the request that is furthest behind."""
        return max((length - self.heard.get(name, 5)) // 2 for name, length in self.said.items())


def polled(*targets: Steady, polls: int = 200) -> list[list[int]]:
    """How far each target was behind after each poll of a drafter that they share."""
    tenants = Tenants(Nobody(), msgspec.structs.replace(OPTIONS, max_num_seqs=4 * SLOTS), lambda _: WELCOME, 1, LOGGER)
    for number, target in enumerate(targets):
        tenants._tenants[number] = Tenant(number, "", Wire(target.say), 0.0, HELLO, ration=Ration(SLOTS + 1))
    behind: list[list[int]] = [[] for _ in targets]
    for _ in range(polls):
        for step in tenants.poll(0.0):
            for event in step.events:
                number, _, name = event.request_id.partition(":")
                targets[int(number)].hear(name, event)
        for target, rounds in zip(targets, behind):
            rounds.append(target.behind)
            target.advance()
    os.close(tenants._stop)
    return behind


@pytest.mark.parametrize("rounds", [2, MAX_MERGED_STEPS // 2])
def test_a_full_batch_that_is_faster_than_the_drafter_s_polls_does_not_fall_behind(rounds: int) -> None:
    fast, slow = Steady(rounds), Steady(1)
    behind, other = polled(fast, slow)
    assert max(behind[-50:]) <= 4 * rounds and min(behind[-50:]) == 0, behind
    assert max(other[-50:]) <= 1, "the other one is heard as before"
    assert fast.num_events <= 200 * (SLOTS + 1) + 8 * SLOTS, "it is no more work than its ration"


def test_requests_that_come_and_leave_do_not_end_that() -> None:
    behind, _ = polled(Steady(2, life=4 * SLOTS), Steady(1, life=4 * SLOTS))
    assert max(behind[-50:]) <= 6 and min(behind[-50:]) == 0, behind
