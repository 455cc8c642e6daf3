"""What a drafter's server makes of a target's messages: stats when they matter, and no harm from a broken target."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from engine_target import K, check_conservation, engine_of, grow
from fake_link import pair
from fake_model import FakePagedModel
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ssd.drafter import server
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.link.protocol import Close, DrafterStats, Hello, Open, Outcome, Step, pack_ids
from vllm_ssd.link.transport import Transport, TransportClosed

VOCAB_SIZE = FakePagedModel.vocab_size
SOON_S = 30.0


class SlowModel(FakePagedModel):
    """Two forwards take longer than the interval of the stats in these tests."""

    def forward(self, batch):
        time.sleep(0.03)
        return super().forward(batch)


class Served:
    """An engine that a thread serves, and the target's end of its link."""

    def __init__(self, model: FakePagedModel) -> None:
        self.engine: DraftEngine = engine_of(model)
        self.target, drafter = pair()
        self._thread = threading.Thread(target=self._serve, args=(drafter,), daemon=True)
        self._thread.start()

    def _serve(self, drafter: Transport) -> None:
        try:
            server.serve(drafter, self.engine)
        except TransportClosed:
            pass

    def send(self, *events: Open | Outcome | Close) -> None:
        self.target.send(Step(list(events), K))

    def stats(self, done: Callable[[list[DrafterStats]], bool]) -> list[DrafterStats]:
        """All stats until `done` of them."""
        stats: list[DrafterStats] = []
        deadline = time.monotonic() + SOON_S
        while not done(stats):
            assert time.monotonic() < deadline, stats
            stats += [push.stats for push in self.target.poll(0.02) if push.stats]
        return stats

    def close(self) -> None:
        self.target.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[[FakePagedModel], Served]]:
    served: list[Served] = []

    def serve(model: FakePagedModel) -> Served:
        served.append(Served(model))
        return served[-1]

    yield serve
    for each in served:
        each.close()


def an_open(request_id: str = "a", token_ids: bytes = pack_ids([1, 2, 3]), temperature: float = 0.0) -> Open:
    return Open(request_id, 1, token_ids, temperature)


def test_stats_follow_the_last_request_at_once(serve, monkeypatch):
    """Nobody would look again for as long as the server is idle."""
    monkeypatch.setattr(server, "STATS_INTERVAL_S", 1000.0)
    served = serve(FakePagedModel(60))
    served.send(an_open("a"), an_open("b"))
    served.send(Close("a"))
    assert not served.stats(lambda _: list(served.engine.sequences) == ["b"] and not served.engine.has_work)
    served.send(Close("b"))
    (stats,) = served.stats(bool)
    assert not served.target.poll(0.2)
    assert stats.pages_free == stats.pages_total == 60 and stats.steps == served.engine.num_steps > K


def test_stats_follow_what_was_done_after_the_last_ones(serve, monkeypatch):
    """The target said something once; the drafter works for longer than the interval, then rests."""
    monkeypatch.setattr(server, "STATS_INTERVAL_S", 0.05)
    served = serve(SlowModel(60))
    served.send(an_open())
    stats = served.stats(lambda stats: bool(stats) and stats[-1].steps == K + 2)
    assert len(stats) > 1
    assert not served.target.poll(0.2) and served.engine.num_steps == K + 2
    assert stats[-1].pages_free == served.engine.pages.num_free < 60


def test_a_second_hello_is_no_step(serve):
    served = serve(FakePagedModel(60))
    served.target.send(Hello(1, VOCAB_SIZE, K, ""))
    served.send(an_open())
    assert served.target.poll(SOON_S)


BROKEN = {
    "temperature NaN": an_open(temperature=float("nan")),
    "temperature infinite": an_open(temperature=float("inf")),
    "temperature below 0": an_open(temperature=-1.0),
    "temperature that overflows": an_open(temperature=1e-42),
    "prompt with a negative id": an_open(token_ids=pack_ids([1, -1, 3])),
    "prompt beyond the vocabulary": an_open(token_ids=pack_ids([1, VOCAB_SIZE])),
    "no prompt": an_open(token_ids=b""),
    "half an id": an_open(token_ids=b"abcdef"),
    "emitted beyond the vocabulary": Outcome("a", 1, 4, [VOCAB_SIZE], []),
    "emitted negative": Outcome("a", 1, 4, [-1], []),
    "drafts beyond the vocabulary": Outcome("a", 1, 4, [1], [2, 2**31 - 1]),
    "drafts negative": Outcome("a", 1, 4, [1], [-2]),
    "more drafts than K": Outcome("a", 1, 4, [1], [2] * (K + 1)),
    "more just-in-time drafts than K": Outcome("a", 1, 4, [1], [], jit=K + 1),
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", BROKEN)
def test_what_a_sound_target_would_not_say_costs_its_request_only(make_target, name, temperature):
    target = make_target()
    target.open("a", [1, 2, 3], temperature)
    target.open("b", [4, 5], temperature)
    target.step()
    target.step()
    server.apply(target.engine, BROKEN[name], K)
    check_conservation(target.engine)
    grow(target)
    assert target.evicted == 1 and set(target.engine.sequences) == {"b"} and not target.engine.num_evictions
    assert {len(drafts) for drafts in target.blocks["b"].values()} == {K}
    target.open("a", [1, 2, 3], temperature)
    grow(target)
    assert {len(drafts) for drafts in target.blocks["a"].values()} == {K}


IDS = st.lists(st.sampled_from([-(2**31), -1, 0, 1, 2, 5, VOCAB_SIZE - 1, VOCAB_SIZE, 2**31 - 1]), max_size=K + 2)
NAMES, COUNTS = st.sampled_from("abc"), st.integers(0, K + 2)
TEMPERATURES = st.sampled_from([0.0, 0.7, 1e-30, -0.5, 1e300, float("nan"), float("-inf")])
EVENTS = st.one_of(
    st.builds(Open, NAMES, COUNTS, st.one_of(IDS.map(pack_ids), st.binary(max_size=9)), TEMPERATURES),
    st.builds(Open, NAMES, COUNTS, st.lists(st.integers(0, 5), min_size=1, max_size=9).map(pack_ids), st.just(0.7)),
    st.builds(Outcome, NAMES, COUNTS, st.integers(0, 9), IDS, IDS, COUNTS),
    st.builds(Close, NAMES),
)


@settings(max_examples=60, derandomize=True)
@given(steps=st.lists(st.tuples(st.lists(EVENTS, max_size=3), COUNTS, st.integers(0, 3)), max_size=12))
def test_no_event_breaks_the_engine(make_target, steps):
    engine = make_target(num_pages=20, max_num_seqs=2, max_model_len=20).engine
    for events, num_drafts, num_forwards in steps:
        for event in events:
            server.apply(engine, event, num_drafts)
            check_conservation(engine)
        for _ in range(num_forwards):
            engine.speculate()
            check_conservation(engine)


def test_more_drafts_a_round_than_agreed_are_refused(make_target):
    target = make_target()
    target.open("a", [1, 2, 3])
    grow(target)
    server.apply(target.engine, Outcome("a", 1, 4, [1], []), K + 1)
    server.apply(target.engine, an_open("b"), 2**40)
    grow(target)
    assert target.evicted == 2 and not target.engine.sequences


def test_only_lack_of_pages_counts_as_an_eviction(make_target):
    """The guide advises more memory where evictions are counted: that must be a cure."""
    target = make_target(num_pages=60, max_model_len=20, max_num_seqs=2)
    target.open("too long", [1] * 30)
    for name in "abc":
        target.open(name, [1, 2, 3])  # the third takes the place of the first
    target.advance("b", [1] * 12, [2])
    grow(target)
    assert target.evicted == 3 and set(target.engine.sequences) == {"c"} and target.engine.num_evictions == 0
    target = make_target(num_pages=6)
    for name in "ab":
        target.open(name, [1, 2, ord(name) % 13])
        grow(target)
    assert target.evicted == target.engine.num_evictions > 0
    assert target.engine.stats().evictions == target.engine.num_evictions


def test_stats_name_the_pages_in_use():
    engine = engine_of(FakePagedModel(60))
    engine.open("a", 1, np.array([1, 2, 3], np.int32), 0.0, K)
    while engine.has_work:
        engine.speculate()
    assert (engine.stats().pages_free, engine.stats().pages_total) == (engine.pages.num_free, 60)
