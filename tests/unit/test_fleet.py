"""Several drafters of one target: where requests go, and what becomes of them when a drafter dies or falls silent."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_requests import K, ModelLink, block

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import Close, Open, Push, SpeculationBlock
from vllm_ssd.target.members import LATE_ROUNDS, MAX_REOPENED_TOKENS, PREFIX_TOKENS
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import DrafterClient, RemoteRequest

IDS = st.sampled_from("abcd")
LONG = 1 << 20
LONG_S = 60.0


class FleetLink(ModelLink):
    """A model of a drafter that may fall silent, with a descriptor."""

    def __init__(self, max_model_len: int = LONG) -> None:
        super().__init__()
        self.max_model_len = max_model_len
        self.suspect = False
        self.ready, self._news = os.pipe()

    def descriptor(self) -> int | None:
        return self.ready if self.connected else -1

    def push(self, *args, **kwargs) -> None:
        super().push(*args, **kwargs)
        os.write(self._news, b"x")

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        pushes = super().poll(timeout_s)
        if pushes:
            os.read(self.ready, 1 << 10)
        return pushes

    def come_back(self) -> None:
        super().come_back()
        self.suspect = False


@pytest.fixture(autouse=True)
def room_for_long_prompts(monkeypatch):
    monkeypatch.setattr("test_requests.MAX_LENGTH", LONG)


def make(num_drafters: int) -> tuple[list[FleetLink], DrafterClient, list[SpeculationBlock]]:
    links, kept = [FleetLink() for _ in range(num_drafters)], []
    config = SSDConfig.from_user({"model": "x", "num_speculative_tokens": K})
    client = DrafterClient(
        config, Fleet(links), Metrics(K, logging.getLogger("test")), lambda push, blocks, firsts: kept.extend(blocks)
    )
    client._members._random.seed(0)
    return links, client, kept


def open_all(client: DrafterClient, prompts: list) -> list[RemoteRequest]:
    requests = [client.add(str(i), 0.0) for i in range(len(prompts))]
    for request, prompt in zip(requests, prompts):
        client.open(request, prompt)
    client.send(K)
    return requests


def test_requests_spread_over_the_drafters():
    links, client, _ = make(4)
    open_all(client, [[i, i + 1] for i in range(64)])
    assert all(10 <= len(link.held) <= 22 for link in links), [len(link.held) for link in links]


def test_a_fleet_without_drafters_gets_its_first():
    """As with `min_drafters: 0`, and at the start of any server whose drafters Ray places."""
    _, client, _ = make(0)
    early = client.add("early", 0.0)
    assert not client.open(early, [1]) and not client.holds(early) and not client.may_wait(early, 1)
    client.outcome(early, [2], [])
    client.poll()
    client.send(K)
    assert not early.too_long
    client._fleet.links.append(FleetLink())
    late = client.add("late", 0.0)
    assert client.open(late, [1]) and client.open(early, [1, 2]), "before the next poll"
    client.close("early")
    client.send(K)
    assert {*client._fleet.links[0].held} == {"late"}


def test_a_prefix_goes_to_the_drafter_that_knows_it_unless_that_is_busy():
    links, client, _ = make(3)
    chat = list(range(PREFIX_TOKENS))
    (first,) = open_all(client, [chat])
    client.close(first.request_id)
    for i in range(6):
        client.open(client.add(f"other {i}", 0.0), [1000 + i])
    again = client.add("next turn", 0.0)
    assert client.open(again, [*chat, 7, 8, 9]) and again.member == first.member
    turns = [client.add(f"turn {i}", 0.0) for i in range(30)]
    for turn in turns:
        client.open(turn, [*chat, 1])
    assert len({turn.member for turn in turns}) == 3


def test_a_request_stays_while_its_drafter_answers():
    _, client, _ = make(3)
    (request,) = open_all(client, [[1, 2, 3]])
    member = request.member
    for _ in range(20):
        assert client.open(request, [1, 2, 3]) and request.member == member


def test_the_requests_of_a_dead_drafter_go_to_the_others():
    links, client, _ = make(2)
    requests = open_all(client, [[i] for i in range(12)])
    dead, alive = links
    left = [request for request in requests if client.holds(request) and request.member == 1]
    dead.die()
    lost = [request for request in requests if request.member == 0]
    assert lost and left
    client.poll()
    for request in lost:
        assert not client.holds(request)
        assert client.open(request, [1, 2])
    client.send(K)
    assert {*alive.held} == {request.request_id for request in requests}
    dead.come_back()
    assert all(client.holds(request) for request in requests), "nothing moves back by itself"


def test_requests_from_elsewhere_are_read_in_pieces():
    links, client, _ = make(2)
    size = MAX_REOPENED_TOKENS // 2
    prompts = [np.full(size, i, np.int32) for i in range(8)]
    requests = open_all(client, prompts)
    links[0].die()
    lost = [request for request in requests if request.member == 0]
    on_the_way = sum(link_size for link_size in (len(held.token_ids) for held in links[1].held.values()))
    assert len(lost) >= 2 and on_the_way >= MAX_REOPENED_TOKENS
    assert not client.open(lost[0], prompts[0]), "it still reads its own"
    for name, held in list(links[1].held.items()):
        links[1].push([block(name, held.epoch, len(held.token_ids))])
    client.poll()
    assert [client.open(request, prompts[0]) for request in lost[:3]] == [True, True, False][: len(lost)]


def test_the_requests_of_a_silent_drafter_move_and_its_late_blocks_are_stale():
    links, client, kept = make(2)
    requests = open_all(client, [[i] for i in range(12)])
    silent = links[0]
    moved = [request for request in requests if request.member == 0]
    epochs = {request.request_id: request.epoch for request in moved}
    silent.suspect = True
    client.poll()
    for request in moved:
        assert not client.holds(request) and client.open(request, [1]) and request.member == 1
    client.send(K)
    assert not silent.held, "it was told to forget them"
    silent.suspect = False
    silent.push([block(name, epoch, 1) for name, epoch in epochs.items()])
    client.poll()
    assert not kept and not silent.events[-1] == Open


def test_the_only_drafter_keeps_its_requests_however_silent():
    links, client, _ = make(2)
    links[1].die()
    (request,) = open_all(client, [[1, 2]])
    links[0].suspect = True
    client.poll()
    assert client.holds(request)


def test_a_drafter_that_is_late_gets_no_new_requests():
    links, client, _ = make(2)
    requests = open_all(client, [[i] for i in range(16)])
    for request in requests:
        for _ in range(LATE_ROUNDS):
            client.looked_up(request, hit=False, block=request.member == 1)
    more = [client.add(f"new {i}", 0.0) for i in range(8)]
    assert all(client.open(request, [7]) for request in more)
    assert {request.member for request in more} == {1}
    links[1].die()
    assert client.open(client.add("last", 0.0), [1]), "a late drafter is better than none"


def test_a_drafter_that_was_late_is_tried_again():
    _, client, _ = make(2)
    for request in open_all(client, [[i] for i in range(16)]):
        for _ in range(LATE_ROUNDS):
            client.looked_up(request, hit=False, block=request.member == 1)
    more = [client.add(f"new {i}", 0.0) for i in range(40)]
    assert all(client.open(request, [7]) for request in more)
    assert any(request.member == 0 for request in more)


def test_a_drafter_that_was_silent_is_used_when_it_speaks_again():
    links, client, _ = make(2)
    for request in open_all(client, [[i] for i in range(16)]):
        for _ in range(LATE_ROUNDS):
            client.looked_up(request, hit=False, block=request.member == 1)
    for links[0].suspect in (True, False):
        client.poll()
    more = [client.add(f"new {i}", 0.0) for i in range(8)]
    assert all(client.open(request, [7]) for request in more)
    assert any(request.member == 0 for request in more)


def test_a_wait_ends_with_the_first_push_of_any_drafter():
    links, client, kept = make(3)
    requests = open_all(client, [[i] for i in range(9)])
    request = next(request for request in requests if request.member == 2)
    started = time.monotonic()
    threading.Timer(0.05, links[2].push, [[block(request.request_id, request.epoch, 1)]]).start()
    client.poll(LONG_S)
    assert 0.05 <= time.monotonic() - started < LONG_S / 2 and len(kept) == 1


def test_a_wait_without_a_push_ends_in_time():
    links, client, _ = make(3)
    started = time.monotonic()
    client.poll(0.05)
    assert 0.05 <= time.monotonic() - started < LONG_S / 2
    for link in links:
        link.die()
    started = time.monotonic()
    client.poll(LONG_S)
    assert time.monotonic() - started < LONG_S / 2, "nobody is there to wait for"


def test_the_courier_wakes_for_a_push_or_its_wakeup():
    links, _, _ = make(2)
    fleet, wakeup = Fleet(links), os.eventfd(0)
    fleet.wait(wakeup, 0.01)
    links[1].push()
    fleet.wait(wakeup, 60.0)
    links[1].poll()
    os.eventfd_write(wakeup, 1)
    fleet.wait(wakeup, 60.0)
    os.close(wakeup)


class Turmoil(RuleBasedStateMachine):
    """Requests of a target come and go while its drafters die, fall silent and come back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.client, self.kept = make(3)
        self.requests: dict[str, RemoteRequest] = {}
        self.token_ids: dict[str, list[int]] = {}

    @rule(request_id=IDS, length=st.integers(1, 5))
    def add(self, request_id: str, length: int) -> None:
        self.requests[request_id] = self.client.add(request_id, 0.0)
        self.token_ids[request_id] = list(range(length))
        self.client.open(self.requests[request_id], self.token_ids[request_id])

    @precondition(lambda self: self.requests)
    @rule(num_emitted=st.integers(0, K + 1))
    def rounds(self, num_emitted: int) -> None:
        self.client.begin_round()
        self.client.poll()
        for request_id, request in self.requests.items():
            self.token_ids[request_id] += range(num_emitted)
            token_ids = self.token_ids[request_id]
            if self.client.holds(request):
                self.client.outcome(request, token_ids[request.length :], [])
            else:
                there = any(link.connected and not link.suspect for link in self.links)
                opened = self.client.open(request, token_ids)
                assert opened or not there or request.reopen_round
        self.client.send(K)

    @rule(request_id=IDS)
    def close(self, request_id: str) -> None:
        self.client.close(request_id)
        self.requests.pop(request_id, None)

    @rule(index=st.integers(0, 2))
    def die(self, index: int) -> None:
        self.links[index].die()

    @rule(index=st.integers(0, 2))
    def come_back(self, index: int) -> None:
        if not self.links[index].connected:
            self.links[index].come_back()

    @rule(index=st.integers(0, 2), silent=st.booleans())
    def fall_silent(self, index: int, silent: bool) -> None:
        self.links[index].suspect = silent and self.links[index].connected

    @rule(index=st.integers(0, 2), data=st.data())
    def evict(self, index: int, data: st.DataObject) -> None:
        link = self.links[index]
        if link.connected and link.held:
            link.evict(data.draw(st.sampled_from(sorted(link.held))))

    @rule()
    def push_and_poll(self) -> None:
        """Blocks of every request, from whoever holds it or once held it."""
        for link in self.links:
            for name, held in link.held.items():
                link.push([block(name, held.epoch, len(held.token_ids))])
        before = len(self.kept)
        self.client.send(K)
        self.client.poll()
        for found in self.kept[before:]:
            request = self.requests[found.request_id]
            assert (found.epoch, found.length) == (request.epoch, request.length)

    @invariant()
    def one_drafter_holds_what_the_target_believes(self) -> None:
        self.client.send(K)
        holders = Counter(name for link in self.links if link.connected for name in link.held)
        assert all(number == 1 for number in holders.values())
        for name, request in self.requests.items():
            link = self.links[request.member]
            if self.client.reaches(request) and name in link.held:
                assert link.held[name].epoch == request.epoch
                assert link.held[name].token_ids == self.token_ids[name][: request.length]
            elif self.client.reaches(request):
                assert name in link.evicted

    @invariant()
    def loads_are_counted(self) -> None:
        for member in self.client._members:
            member.catch_up()
            believed = [
                r for r in self.requests.values() if r.member == member.index and r.generation == member.generation
            ]
            assert member.num_held == len(believed)
            assert {*member.reading} <= {request.request_id for request in believed}


TestTurmoil = Turmoil.TestCase
TestTurmoil.settings = settings(max_examples=100, stateful_step_count=40)


def test_a_member_forgets_with_its_process():
    links, client, _ = make(2)
    (request,) = open_all(client, [[1, 2]])
    link = links[request.member]
    client.outcome(request, [3], [])
    link.die()
    link.come_back()
    client.close(request.request_id)
    client.send(K)
    assert not any(isinstance(event, Close) for event in link.events), "the new process never knew it"
