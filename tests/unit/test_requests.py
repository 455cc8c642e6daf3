"""`DrafterClient` against a model of the drafter: whatever happens in whatever order, both agree on what is held."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import (
    Close,
    Evicted,
    Open,
    Outcome,
    Push,
    SpeculationBlock,
    Step,
    Truncation,
    pack_bias,
    pack_ids,
    unpack_ids,
)
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import REOPEN_ROUNDS, DrafterClient, RemoteRequest

K = 3
MAX_MODEL_LEN = 20
MAX_LENGTH = MAX_MODEL_LEN - 2 * K - 2
IDS = st.sampled_from("ab")
DRAFTS = st.lists(st.integers(0, 9), max_size=K)


@dataclass
class Held:
    """A request on the drafter."""

    epoch: int
    token_ids: list[int]


class ModelLink:
    """A drafter that holds token lists, checks every event against them, and pushes what the test tells it to."""

    leaving = False

    def __init__(self) -> None:
        self.generation, self.connected, self.max_model_len = 1, True, MAX_MODEL_LEN
        self.held: dict[str, Held] = {}
        self.evicted: dict[str, int] = {}  # epoch in which a request was evicted, while the target may not know
        self.pushes: list[Push] = []
        self.epochs: list[int] = []
        self.events: list[Open | Outcome | Close] = []

    def send(self, step: Step) -> None:
        assert step.events
        if self.connected:
            for event in step.events:
                self.events.append(event)
                self._apply(event)

    def _apply(self, event: Open | Outcome | Close) -> None:
        held = self.held.get(event.request_id)
        if isinstance(event, Open):
            assert event.epoch not in self.epochs, "epochs are used once"
            self.epochs.append(event.epoch)
            token_ids = unpack_ids(event.token_ids).tolist()
            assert len(token_ids) <= MAX_LENGTH
            self.held[event.request_id] = Held(event.epoch, token_ids)
            self.evicted.pop(event.request_id, None)
        elif event.request_id in self.evicted:  # said before the eviction was heard of
            if isinstance(event, Outcome):
                assert event.epoch == self.evicted[event.request_id]
                self.push(evicted=[Evicted(event.request_id, event.epoch)])
        else:
            assert held is not None, "it was never opened, or was closed"
            if isinstance(event, Close):
                del self.held[event.request_id]
                return
            assert event.epoch == held.epoch
            held.token_ids += event.emitted
            assert event.length == len(held.token_ids) <= MAX_LENGTH

    def evict(self, request_id: str) -> None:
        self.evicted[request_id] = self.held.pop(request_id).epoch
        self.push(evicted=[Evicted(request_id, self.evicted[request_id])])

    def push(self, blocks: Sequence[SpeculationBlock] = (), evicted: Sequence[Evicted] = ()) -> None:
        self.pushes.append(Push(list(blocks), list(evicted), None))

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        if not self.connected:
            return []
        pushes, self.pushes = self.pushes, []
        return pushes

    def die(self) -> None:
        self.connected = False

    def come_back(self) -> None:
        self.held, self.evicted, self.pushes = {}, {}, []
        self.generation += 1
        self.connected = True


def block(request_id: str, epoch: int, length: int, drafts: bytes = pack_ids([2])) -> SpeculationBlock:
    return SpeculationBlock(request_id, epoch, length, 0, pack_ids([0, 1]), drafts)


def make() -> tuple[ModelLink, DrafterClient, Metrics, list[SpeculationBlock]]:
    link, metrics, kept = ModelLink(), Metrics(K, logging.getLogger("test")), []
    config = SSDConfig.from_user({"model": "x", "num_speculative_tokens": K})
    client = DrafterClient(config, Fleet([link]), metrics, lambda push, blocks, firsts: kept.extend(blocks))
    return link, client, metrics, kept


class Conversation(RuleBasedStateMachine):
    """Requests of a target come and go, the drafter evicts, dies and comes back, both at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.link, self.client, self.metrics, self.kept = make()
        self.requests: dict[str, RemoteRequest] = {}
        self.token_ids: dict[str, list[int]] = {}
        self.too_long: set[str] = set()
        self.outgrown: list[str] = []
        self.counted: list[str] = []
        self.metrics.too_long = self.counted.append
        self.num_rounds = 0
        self.evictions: dict[str, int] = {}
        self.pause_ends: dict[str, int] = {}

    def outgrow(self, request_id: str) -> None:
        self.too_long.add(request_id)
        self.outgrown.append(request_id)

    # ---- the target ------------------------------------------------------------------------------------

    @rule(request_id=IDS, length=st.integers(1, MAX_LENGTH + 1), opened=st.booleans())
    def add(self, request_id: str, length: int, opened: bool) -> None:
        """A new request, perhaps with an id that was never closed."""
        self.requests[request_id] = self.client.add(request_id, 0.0)
        self.token_ids[request_id] = list(range(length))
        self.too_long.discard(request_id)
        self.evictions[request_id] = self.pause_ends[request_id] = 0
        if opened:
            self.open(request_id, [])

    @precondition(lambda self: self.requests)
    @rule(
        number=st.sampled_from([1, 1, 1, REOPEN_ROUNDS]),
        num_emitted=st.integers(0, K + 1),
        drafts=DRAFTS,
        polled=st.booleans(),
    )
    def rounds(self, number: int, num_emitted: int, drafts: list[int], polled: bool) -> None:
        """What owners do: tell the outcome of a request that is held, open any other; the last round is told."""
        if polled:
            self.poll()
        for _ in range(number):
            self.client.begin_round()
        self.num_rounds += number
        for request_id, request in self.requests.items():
            if self.client.holds(request):
                self.outcome(request_id, num_emitted, drafts)
            else:
                self.token_ids[request_id] += range(num_emitted)
                self.open(request_id, drafts)
        self.client.send(K)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), drafts=DRAFTS)
    def open_any(self, data: st.DataObject, drafts: list[int]) -> None:
        """Held ones as well."""
        self.open(data.draw(st.sampled_from(sorted(self.requests))), drafts)

    def open(self, request_id: str, drafts: list[int]) -> None:
        opened = self.client.open(self.requests[request_id], self.token_ids[request_id], drafts)
        may = self.link.connected and self.num_rounds >= self.pause_ends[request_id] and request_id not in self.too_long
        assert opened == (may and len(self.token_ids[request_id]) <= MAX_LENGTH)
        assert self.client.holds(self.requests[request_id]) == opened
        if may and not opened:
            self.outgrow(request_id)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num_emitted=st.integers(0, K + 1), drafts=DRAFTS)
    def outcome_of_any(self, data: st.DataObject, num_emitted: int, drafts: list[int]) -> None:
        """Of those that are not held as well."""
        self.outcome(data.draw(st.sampled_from(sorted(self.requests))), num_emitted, drafts)

    def outcome(self, request_id: str, num_emitted: int, drafts: list[int]) -> None:
        request, token_ids = self.requests[request_id], self.token_ids[request_id]
        token_ids += range(num_emitted)
        if self.client.holds(request):
            if len(token_ids) > MAX_LENGTH:
                self.outgrow(request_id)
        self.client.outcome(request, token_ids[request.length :], drafts)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def lose_tokens(self, data: st.DataObject) -> None:
        """The committed length falls; owners open such a request anew."""
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.token_ids[request_id] = self.token_ids[request_id][: data.draw(st.integers(1, 5))]
        self.open(request_id, [])

    @rule(request_id=IDS)
    def close(self, request_id: str) -> None:
        self.client.close(request_id)
        self.too_long.discard(request_id)
        request = self.requests.pop(request_id, None)
        if request is not None:
            self.client.outcome(request, [], [])
            assert not self.client.holds(request), "forgotten"

    @rule()
    def send(self) -> None:
        self.client.send(K)

    @rule()
    def poll(self) -> None:
        """All that is accepted is what the drafter pushed for the request it holds; the rest is stale."""
        self.client.send(K)
        pushes = list(self.link.pushes) if self.link.connected else []
        stale, num_kept = self.metrics.counts["stale_blocks"], len(self.kept)
        told = {
            request_id: (request.epoch, request.length)
            for request_id, request in self.requests.items()
            if self.client.holds(request)
        }
        self.client.poll()
        accepted, num_blocks = [], 0
        for push in pushes:
            num_blocks += len(push.blocks)
            accepted += [b for b in push.blocks if told.get(b.request_id) == (b.epoch, b.length) and b.fits]
            for evicted in push.evicted:
                if told.get(evicted.request_id, (None,))[0] == evicted.epoch:
                    del told[evicted.request_id]
                    pause = REOPEN_ROUNDS << min(self.evictions[evicted.request_id], 6)
                    self.evictions[evicted.request_id] += 1
                    self.pause_ends[evicted.request_id] = self.num_rounds + pause
        assert all(request.evictions == self.evictions[name] for name, request in self.requests.items())
        assert self.kept[num_kept:] == accepted
        assert self.metrics.counts["stale_blocks"] - stale == num_blocks - len(accepted)

    # ---- the drafter -----------------------------------------------------------------------------------

    @precondition(lambda self: self.link.held)
    @rule(data=st.data(), flaw=st.sampled_from(["none", "none", "length", "epoch", "size"]))
    def push_block(self, data: st.DataObject, flaw: str) -> None:
        """A block, perhaps for another length, perhaps of an earlier epoch, perhaps broken."""
        request_id = data.draw(st.sampled_from(sorted(self.link.held)))
        held = self.link.held[request_id]
        epoch = data.draw(st.sampled_from(self.link.epochs)) if flaw == "epoch" else held.epoch
        length = len(held.token_ids) + (flaw == "length")
        self.link.push([block(request_id, epoch, length, b"x" if flaw == "size" else pack_ids([2]))])
        if data.draw(st.booleans()):
            self.poll()

    @precondition(lambda self: self.link.held)
    @rule(data=st.data(), known=st.booleans())
    def evict(self, data: st.DataObject, known: bool) -> None:
        """With a block for the request behind it, which a sound drafter would not push."""
        request_id = data.draw(st.sampled_from(sorted(self.link.held)))
        held = self.link.held[request_id]
        self.link.evict(request_id)
        self.link.push([block(request_id, held.epoch, len(held.token_ids))])
        if known:
            self.poll()

    @rule(returned=st.booleans())
    def die(self, returned: bool) -> None:
        self.link.die()
        if returned:
            self.link.come_back()

    @precondition(lambda self: not self.link.connected)
    @rule()
    def come_back(self) -> None:
        self.link.come_back()

    # ---- what always holds -----------------------------------------------------------------------------

    @invariant()
    def both_sides_agree(self) -> None:
        """Once all was sent, the drafter holds exactly what the target believes, or has said that it does not."""
        if self.client._members[0].events or not self.link.connected:
            return
        believed = {name: request for name, request in self.requests.items() if self.client.holds(request)}
        assert {*self.link.held} <= {*believed} <= {*self.link.held, *self.link.evicted}
        for request_id, held in self.link.held.items():
            request = believed[request_id]
            assert (request.epoch, request.length) == (held.epoch, len(held.token_ids))
            assert held.token_ids == self.token_ids[request_id][: request.length]

    @invariant()
    def growth_is_counted_once(self) -> None:
        assert self.counted == self.outgrown
        assert {name for name, request in self.requests.items() if request.too_long} == self.too_long
        assert not any(self.client.holds(self.requests[name]) for name in self.too_long)


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=200, stateful_step_count=50)


def test_each_eviction_doubles_the_pause():
    link, client, _, _ = make()
    request = client.add("a", 0.0)
    for pause in (REOPEN_ROUNDS, 2 * REOPEN_ROUNDS, 4 * REOPEN_ROUNDS):
        assert client.open(request, [1, 2])
        client.send(K)
        link.evict("a")
        client.poll()
        for _ in range(pause):
            assert not client.open(request, [1, 2])
            client.begin_round()


def test_an_eviction_of_an_earlier_epoch_is_ignored():
    link, client, _, _ = make()
    request = client.add("a", 0.0)
    assert client.open(request, [1, 2]) and client.open(request, [1])
    client.send(K)
    link.push(evicted=[Evicted("a", request.epoch - 1)])
    client.poll()
    assert client.holds(request) and request.evictions == 0


def test_the_drafter_is_told_what_a_request_samples_from_each_time_it_is_opened():
    link, client, _, _ = make()
    sent: list[Open] = []
    link.send = lambda step: sent.extend(step.events)
    truncation = Truncation(20, 0.8, bias=pack_bias([1, 2], {}))
    request = client.add("a", 0.7, truncation, b"salt")
    for _ in range(2):
        assert client.open(request, [1, 2])
        client.send(K)
    assert [(e.temperature, e.truncation, e.cache_salt) for e in sent] == [(0.7, truncation, b"salt")] * 2


def test_a_push_is_awaited_from_a_vain_wait_to_the_next_push():
    link, client, _, _ = make()
    request = client.add("a", 0.0)
    assert client.open(request, [1, 2])
    client.poll()
    assert client.may_wait(request, 2), "nobody waited"
    client.poll(0.01, [request])
    client.poll()
    assert not client.may_wait(request, 2)
    link.push()
    client.poll(0.01, [request])
    assert client.may_wait(request, 2)
    assert not client.may_wait(request, MAX_LENGTH + 1)
    link.die()
    assert not client.may_wait(request, 2)
