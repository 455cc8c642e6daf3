"""The thread between device and drafter, its work done by hand: a target a step ahead, and outcomes that come late."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

import fake_model
import numpy as np
import pytest
import torch
from fake_link import InProcessLink, K, PolledFleet

from vllm_ssd.compat.target.runner import DrafterState
from vllm_ssd.config import SSDConfig
from vllm_ssd.kernels import DeviceSpeculation, Found, lookup
from vllm_ssd.link.protocol import Close, Evicted, Open, Outcome, Push
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.v2.courier import NUM_BUFFERS, Courier
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

SLOTS = 4
LOGGER = logging.getLogger("test")
PROMPTS = {"a": [1, 2, 3], "b": [4] * 9, "c": [5, 6]}


class Link(InProcessLink):
    """An in-process drafter that a thread can sleep on."""

    closed = False

    def close(self) -> None:
        self.closed = True


class Device:
    """Verifies drafts at temperature 0 and looks the next ones up, as the V2 runner and `SSDSpeculator` do."""

    def __init__(self, link: Link, **options) -> None:
        user = {"model": "x", "num_speculative_tokens": K, "fan_out": 3, **options}
        self.metrics = Metrics(K, LOGGER)
        self.cache = SpeculationCache(SLOTS, 3 * (K + 1), K, 5, "cpu")
        self.courier = Courier(SSDConfig.from_user(user), PolledFleet([link]), self.metrics, self.cache, LOGGER, 1)
        self.requests: dict[str, tuple[int, int]] = {}  # serial number and slot
        self.tokens: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}
        self.verifying = DeviceSpeculation.empty(SLOTS, K, 5, "cpu")
        self.rows: list[list[int]] = []  # the last round's outcomes
        self.num_started = self.step = 0
        self.wanted = K
        self.ngram: Callable[[list[int]], list[int]] = lambda token_ids: token_ids[-1:] * K

    def want(self, num_drafts: int) -> None:
        self.wanted = num_drafts
        self.courier.want(num_drafts)

    def start(self, name: str, token_ids: list[int]) -> None:
        slot = min(set(range(SLOTS)) - {slot for _, slot in self.requests.values()})
        self.requests[name] = self.num_started, slot
        self.tokens[name], self.drafts[name] = list(token_ids), []
        self.courier.start(self.num_started, slot, token_ids, 0.0)
        self.num_started += 1

    def finish(self, name: str) -> list[int]:
        self.courier.finish(self.step + 1, [self.requests.pop(name)[0]])
        del self.drafts[name]
        return self.tokens.pop(name)

    def round(self) -> None:
        names = list(self.requests)
        serials, slots = zip(*self.requests.values())
        emitted = []
        for name in names:
            new: list[int] = []
            for draft in [*self.drafts[name], None]:
                new.append(next_token(self.tokens[name] + new))
                if new[-1] != draft:
                    break
            self.tokens[name] += new
            emitted.append(new)
        by_slot = torch.zeros(3, SLOTS, dtype=torch.int64)
        totals = [len(self.tokens[name]) for name in names]
        by_slot[:, slots] = torch.tensor([serials, totals, [new[-1] for new in emitted]])
        outcomes = self.courier.outcome_buffer()
        drafts = torch.zeros(SLOTS, 1 + K, dtype=torch.int64)
        lookup(
            self.cache.blocks,
            self.verifying,
            torch.tensor(slots),
            torch.tensor([len(new) for new in emitted], dtype=torch.int32),
            by_slot[0],
            by_slot[1].int(),
            by_slot[2],
            torch.zeros(SLOTS),
            self.wanted,
            drafts,
            outcomes.rows,
            torch.tensor([self.ngram(self.tokens[name]) for name in names]) if self.courier.wants_ngram else None,
        )
        self.rows = outcomes.rows[: len(names)].tolist()
        self.step += 1
        self.courier.await_outcomes(self.step, list(serials), [len(self.drafts[name]) for name in names], outcomes)
        for name, (num_drafts, *row) in zip(names, drafts.tolist()):
            self.drafts[name] = row[:num_drafts]

    def outcome(self, num_emitted: int, num_drafts: int, num_drafted: int, num_scheduled: int = K) -> None:
        """A round of the first request by hand: its last token is 9, its next drafts are 4, 5, …"""
        found, branch = (Found.HIT, 0) if num_drafted else (Found.MISS, -1)
        drafts = [4 + i if i < num_drafts else -1 for i in range(K)]
        outcomes = self.courier.outcome_buffer()
        outcomes.rows[0] = torch.tensor([num_emitted, 9, found, branch, num_drafts, num_drafted, *drafts])
        self.step += 1
        self.courier.await_outcomes(self.step, [0], [num_scheduled], outcomes)
        self.courier.work()


def next_token(prefix: list[int]) -> int:
    """The target's choice: usually the drafter's first or second."""
    order = np.argsort(-fake_model.reference_logits(prefix).numpy())
    return int(order[(0, 0, 0, 1, 1, 5)[sum(prefix) % 6]])


def right(token_ids: list[int]) -> list[int]:
    """The target's next K tokens."""
    tokens = list(token_ids)
    for _ in range(K):
        tokens.append(next_token(tokens))
    return tokens[-K:]


def assert_right(tokens: list[int], prompt: list[int]) -> None:
    expected = list(prompt)
    while len(expected) < len(tokens):
        expected.append(next_token(expected))
    assert tokens == expected


def assert_finds_what_is_speculated(device: Device, rounds: int = 12) -> None:
    before = dict(device.metrics.counts)
    for _ in range(rounds):
        device.round()
        device.courier.work()
        device.courier.work()
    assert device.metrics.counts["hits"] - before["hits"] >= rounds // 2


def test_most_rounds_hit() -> None:
    device = Device(Link())
    for name, prompt in PROMPTS.items():
        device.start(name, prompt)
    assert_finds_what_is_speculated(device)
    for name, prompt in PROMPTS.items():
        assert_right(device.tokens[name], prompt)
    counts = device.metrics.counts
    assert counts["hits"] > 2 * counts["misses"] and 15 < counts["accepted_tokens"] <= counts["draft_tokens"]


@pytest.mark.parametrize("seed", range(4))
def test_random_joins_leaves_preemptions_and_delays(seed: int) -> None:
    rng = random.Random(seed)
    link = Link(steps_a_poll=6)
    device = Device(link)
    prompts: dict[str, list[int]] = {}
    for step in range(150):
        if len(device.requests) < SLOTS and rng.random() < 0.3:
            name = f"r{step}"
            prompts[name] = [rng.randrange(13) for _ in range(rng.randint(1, 12))]
            device.start(name, prompts[name])
        if device.requests and rng.random() < 0.1:
            name = rng.choice(list(device.requests))
            tokens = device.finish(name)
            if rng.random() < 0.5 and len(tokens) < 100:
                device.start(name, tokens)  # preempted and resumed, perhaps in another slot
        if device.requests:
            device.round()
        for _ in range(rng.randrange(3)):
            device.courier.work()
        for name, tokens in device.tokens.items():
            assert_right(tokens, prompts[name])
    assert device.metrics.counts["hits"] > 20
    for name in list(device.requests):
        device.finish(name)
    for _ in range(3):
        device.courier.work()
    assert not link.engine.sequences and link.engine.pages.num_free == 400


def test_a_drafter_that_comes_back_is_told_everything() -> None:
    link = Link()
    device = Device(link)
    for name, prompt in PROMPTS.items():
        device.start(name, prompt)
    assert_finds_what_is_speculated(device)
    link.die()
    for _ in range(6):
        device.round()
        device.courier.work()
    link.come_back()
    assert_finds_what_is_speculated(device, rounds=15)
    for name, prompt in PROMPTS.items():
        assert_right(device.tokens[name], prompt)


def test_an_evicted_request_is_opened_again_later() -> None:
    link = Link()
    device = Device(link)
    device.start("a", PROMPTS["a"])
    assert_finds_what_is_speculated(device)
    serial, _ = device.requests["a"]
    link.engine.close(str(serial))
    link._drafter.send(Push([], [Evicted(str(serial), 1)], None))
    device.courier.work()
    device.round()
    device.courier.work()
    for _ in range(40):
        device.round()
        device.courier.work()
    opened = [event for step in link.steps for event in step.events if isinstance(event, Open)]
    assert [event.epoch for event in opened] == [1, 2]
    assert_right(device.tokens["a"], PROMPTS["a"])


def test_a_request_that_outgrows_the_drafter_is_closed_there_for_good() -> None:
    link = Link(max_model_len=40)
    device = Device(link)
    device.start("a", PROMPTS["a"])
    while len(device.tokens["a"]) < 120:
        device.round()
        device.courier.work()
    assert_right(device.tokens["a"], PROMPTS["a"])
    events = [event for step in link.steps for event in step.events]
    assert sum(isinstance(event, Open) for event in events) == 1 and isinstance(events[-1], Close)
    assert device.metrics.counts["too_long"] == 1 and link.engine.num_evictions == 0 and not link.engine.sequences
    device.finish("a")
    device.courier.work()
    assert [event for step in link.steps for event in step.events] == events, "it was closed before"


def test_the_drafter_rests_while_rounds_carry_no_drafts() -> None:
    link = Link()
    device = Device(link)
    device.start("a", PROMPTS["a"])
    assert_finds_what_is_speculated(device)
    device.want(0)
    device.courier.work()
    told, outcomes = len(link.steps), sum(device.metrics.counts[name] for name in ("hits", "misses", "late"))
    device.start("b", PROMPTS["b"])
    for _ in range(8):
        device.round()
        device.courier.work()
    assert len(link.steps) == told and not link.engine.has_work
    assert sum(device.metrics.counts[name] for name in ("hits", "misses", "late")) == outcomes
    device.want(2)
    assert_finds_what_is_speculated(device)
    assert {step.num_speculative_tokens for step in link.steps[told:]} == {2}
    for name in "ab":
        assert_right(device.tokens[name], PROMPTS[name])


def test_a_buffer_is_used_again_once_it_was_read() -> None:
    device = Device(Link())
    device.start("a", PROMPTS["a"])
    used = [device.courier.outcome_buffer() for _ in range(NUM_BUFFERS)]
    device.round()  # with one that had to be made
    for outcomes in used:
        device.courier.await_outcomes(0, [], [], outcomes)
    device.courier.work()
    again = [device.courier.outcome_buffer() for _ in range(NUM_BUFFERS + 1)]
    assert {id(outcomes) for outcomes in used} < {id(outcomes) for outcomes in again}
    device.courier.stop()
    device.courier.await_outcomes(0, [], [], again[0])  # nobody will read it
    assert device.courier.outcome_buffer() is again[0]


def test_ngram_drafts_are_made_while_they_pay() -> None:
    """No block ever comes; drafts that are never right are given up, tried again now and then, and come back."""

    def rounds(number: int) -> int:
        made = 0
        for _ in range(number):
            made += device.courier.wants_ngram
            device.round()
            device.courier.work()
        return made

    device = Device(Link(steps_a_poll=0), on_miss="auto")
    device.ngram = lambda token_ids: [(token + 1) % 13 for token in right(token_ids)]
    device.start("a", PROMPTS["a"])
    assert rounds(60) >= 15, "given up before anything was known"
    assert 1 <= rounds(100) <= 10
    device.ngram = right
    before = device.metrics.counts["accepted_tokens"]
    assert rounds(100) >= 20
    assert device.metrics.counts["accepted_tokens"] - before >= 20 * K
    assert_right(device.tokens["a"], PROMPTS["a"])


def test_short_hits_go_on_with_ngram_drafts() -> None:
    """A drafter that grows one draft a branch, and n-grams that are always right: both end up in one round."""
    device = Device(Link(), on_miss="ngram")
    device.ngram = right
    device.courier.want(1)
    for name, prompt in PROMPTS.items():
        device.start(name, prompt)
    before, emitted = [[0] * 6] * len(PROMPTS), []
    for _ in range(60):
        device.round()
        emitted += [row[0] for last, row in zip(before, device.rows) if last[2] == Found.HIT and last[4:6] == [K, 1]]
        before = device.rows
        device.courier.work()
        device.courier.work()
    for name, prompt in PROMPTS.items():
        assert_right(device.tokens[name], prompt)
    assert len(emitted) >= 10 and set(emitted) == {1 + K}


def test_ngram_drafts_after_others_are_judged_once_those_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link()
    device = Device(link, on_miss="auto")
    device.start("a", PROMPTS["a"])
    device.courier.work()
    judged: list[tuple[int, int]] = []
    monkeypatch.setattr(device.courier._ngram_gain, "observe", lambda *seen: judged.append(seen))
    device.outcome(1, K, 1)
    device.outcome(1, K, 1)
    assert judged == [], "the n-gram drafts came after a draft that was wrong"
    device.outcome(2, K, 1)
    device.outcome(1 + K, K, 1)
    device.outcome(3, K, 1, num_scheduled=2)
    assert judged == [(2, 0), (2, 2), (1, 1)], "of those that were verified"
    device.outcome(1, K, 0)
    device.outcome(1, K, K)
    assert judged[3:] == [(K, 0)], "without others they are judged at once"
    device.outcome(1 + K, 0, 0)
    device.outcome(1, K, 1, num_scheduled=0)
    assert len(judged) == 4, "there were none"
    told = [event.draft_token_ids for step in link.steps for event in step.events if isinstance(event, Outcome)]
    assert told == [[4, 5, 6]] * 7 + [[], [4, 5, 6]]


def test_short_hits_decide_whether_ngram_drafts_are_made() -> None:
    """They are given up although nothing ever missed, and tried again only where they could be used."""

    def tried(rounds: int, *row: int) -> bool:
        seen = False
        for _ in range(rounds):
            device.outcome(*row)
            seen = seen or device.courier.wants_ngram
        return seen

    device = Device(Link(steps_a_poll=0), on_miss="auto")
    device.start("a", PROMPTS["a"])
    tried(60, 2, K, 1)
    assert not device.courier.wants_ngram
    assert not tried(100, 1, K, K), "hits had all drafts that were wanted"
    device.want(1)
    assert not tried(100, 1, 1, 1)
    device.want(K)
    assert tried(33, 1, 1, 1)
    device.outcome(1, 1, 1)
    device.want(0)
    assert tried(33, 1, 0, 0), "the drafter may be away"


@pytest.mark.parametrize(("on_miss", "expected"), [("ngram", True), ("skip", False), ("wait", False)])
def test_other_fallbacks_do_not_depend_on_what_pays(on_miss: str, expected: bool) -> None:
    device = Device(Link(steps_a_poll=0), on_miss=on_miss)
    device.ngram = lambda token_ids: [12 - next_token(token_ids)] * K
    device.start("a", PROMPTS["a"])
    for _ in range(80):
        assert device.courier.wants_ngram is expected
        device.round()
        device.courier.work()


def test_the_threads_end_and_close_the_link() -> None:
    link = Link()
    device = Device(link)
    before = threading.active_count()
    device.courier.run()
    device.start("a", PROMPTS["a"])
    device.finish("a")
    deadline = time.monotonic() + 10
    while device.courier._tasks and time.monotonic() < deadline:
        time.sleep(0.01)
    device.courier.stop()
    for thread in threading.enumerate():
        if thread.name in ("ssd-courier", "ssd-outcomes"):
            thread.join(timeout=10)
    assert threading.active_count() == before and link.closed
    assert any(isinstance(event, Close) for step in link.steps for event in step.events)


def test_the_drafter_is_left_alone_before_the_last_token():
    """Of two requests alike one says when it ends: it is closed with one token to go, and not opened again."""
    link = Link()
    device = Device(link, on_miss="skip")
    for name in "ab":
        device.start(name, PROMPTS["a"])
    device.courier.end_at(device.requests["a"][0], 9)
    device.courier.work()
    while len(device.tokens["a"]) < 8:
        device.round()
        device.courier.work()
        device.courier.work()
    assert set(link.engine.sequences) == {str(device.requests["b"][0])}
    device.round()
    device.finish("a")
    device.courier.work()
    events = [event for step in link.steps for event in step.events]
    assert sum(isinstance(event, Open) for event in events) == 2
    assert sum(isinstance(event, Close) for event in events) == 1


def test_vllm_is_told_while_the_drafter_is_behind_or_away() -> None:
    link = Link()
    device = Device(link, on_miss="skip")

    def round_() -> DrafterState:
        device.round()
        device.courier.work()
        return device.courier.drafter_state

    device.start("a", PROMPTS["a"])
    link.steps_a_poll = 0  # it reads the prompt
    assert {round_() for _ in range(3)} == {DrafterState.BEHIND}
    link.steps_a_poll = 50
    round_()
    assert round_() == DrafterState.IN_TIME
    device.want(0)
    assert {round_() for _ in range(9)} == {DrafterState.IN_TIME}, "rounds of plain decoding count"
    link.steps_a_poll = 0
    device.want(K)
    device.courier.work()
    assert device.courier.drafter_state == DrafterState.BEHIND, "it has yet to hear of nine rounds"
    assert {round_() for _ in range(3)} == {DrafterState.BEHIND}
    link.steps_a_poll = 50
    round_()
    assert round_() == DrafterState.IN_TIME
    link.die()
    assert {round_() for _ in range(3)} == {DrafterState.AWAY}
    link.come_back()
    link.steps_a_poll = 0
    assert {round_() for _ in range(3)} == {DrafterState.BEHIND}
    assert_right(device.tokens["a"], PROMPTS["a"])
