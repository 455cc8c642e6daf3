"""The target's side and the drafter's, joined by a socket and fed by a target without weights."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import fake_model
import numpy as np
import pytest
from fake_link import InProcessLink, K

from vllm_ssd.compat.target.runner_v1 import StartedRequest
from vllm_ssd.config import SSDConfig
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import ALL_TOKENS, NO_NOISE, Evicted, Push, SpeculationBlock, pack_ids
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import SILENT_ROUNDS, RemoteRequest
from vllm_ssd.target.v1.fallback import Fallback
from vllm_ssd.target.v1.request import Request, Speculation
from vllm_ssd.target.v1.round import Batch, Round, Row
from vllm_ssd.target.v1.verifier import Verifier


class FakeTarget:
    """Verifies drafts as vLLM does at temperature 0; its own next token usually is the drafter's first or second."""

    def __init__(self, verifier: Verifier, seed: int = 0) -> None:
        self.verifier, self.random = verifier, random.Random(seed)
        self.tokens: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}

    def next_token(self, prefix: list[int]) -> int:
        order = np.argsort(-fake_model.reference_logits(prefix).numpy())
        return int(order[(0, 0, 0, 1, 1, 5)[sum(prefix) % 6]])

    def start(self, request_id: str, prompt: list[int], temperature: float = 0.0, min_tokens: int = 0) -> None:
        self.tokens[request_id], self.drafts[request_id] = list(prompt), []
        self.verifier.start_requests(
            [StartedRequest(request_id, prompt, temperature, min_tokens, ALL_TOKENS, b"", NO_NOISE)]
        )

    def finish(self, request_id: str) -> None:
        del self.tokens[request_id]
        self.verifier.finish_requests([request_id])

    def round(self, trim: bool = False, skip: bool = False) -> None:
        sampled, num_verified = [], []
        for request_id, tokens in self.tokens.items():
            drafts = self.drafts[request_id]
            if trim:
                drafts = drafts[: self.random.randrange(len(drafts) + 1)]
            num_verified.append(len(drafts))
            new = []
            for draft in [*drafts, None]:
                new.append(self.next_token(tokens + new))
                if new[-1] != draft:
                    break
            tokens += new
            sampled.append(new)
        if skip:  # vLLM does not ask; zeros are scheduled as drafts
            self.drafts = {r: [0] * K for r in self.tokens}
            return
        width = max(map(len, self.tokens.values()))
        token_ids = np.zeros((len(self.tokens), width), np.int32)
        for row, tokens in zip(token_ids, self.tokens.values()):
            row[: len(tokens)] = tokens
        num_tokens = np.array([len(t) for t in self.tokens.values()], np.int32)
        proposed = self.verifier.propose(Batch(list(self.tokens), num_verified, sampled, num_tokens, token_ids))
        self.drafts = dict(zip(self.tokens, proposed))

    def check(self, prompts: dict[str, list[int]]) -> None:
        for request_id, prompt in prompts.items():
            expected = list(prompt)
            while len(expected) < len(self.tokens[request_id]):
                expected.append(self.next_token(expected))
            assert self.tokens[request_id] == expected


def make(link: InProcessLink, **options) -> tuple[Verifier, Metrics]:
    metrics = Metrics(K, logging.getLogger("test"))
    user = {"model": "x", "num_speculative_tokens": K, "adaptive": False, "wait_ms": 1000, **options}
    return Verifier(SSDConfig.from_user(user), Fleet([link]), metrics), metrics


PROMPTS = {"a": [1, 2, 3], "b": [4] * 9, "c": [5, 6]}


@pytest.mark.parametrize("on_miss", ["skip", "wait", "ngram", "auto"])
@pytest.mark.parametrize("trim", [False, True])
def test_text_is_the_targets_and_most_rounds_hit(on_miss, trim):
    link = InProcessLink()
    verifier, metrics = make(link, on_miss=on_miss)
    target = FakeTarget(verifier)
    for request_id, prompt in PROMPTS.items():
        target.start(request_id, prompt)
    for i in range(40):
        target.round(trim=trim, skip=i % 11 == 10)
    target.check(PROMPTS)
    counts = metrics.counts
    assert counts["hits"] > 60 and counts["misses"] > 3, counts
    assert metrics.counts["accepted_tokens"] > 30
    if on_miss == "wait":
        assert counts["waits"] > 0
        jit_rounds = [e for s in link.steps for e in s.events if getattr(e, "jit", 0)]
        assert jit_rounds and all(e.jit == K and not e.draft_token_ids for e in jit_rounds)


def test_auto_drafts_by_ngram_where_that_gains_most():
    """The drafter is dead, and the text repeats itself: nothing else can draft."""
    link = InProcessLink()
    verifier, metrics = make(link, on_miss="auto")
    target = FakeTarget(verifier)
    target.next_token = lambda prefix: prefix[-4]
    target.start("a", [7, 8, 9, 10] * 3)
    link.die()
    for _ in range(10):
        target.round()
    target.check({"a": [7, 8, 9, 10] * 3})
    assert metrics.counts["hits"] == 0 and metrics.counts["accepted_tokens"] == 9 * K
    target.next_token = lambda prefix: len(prefix)  # what follows an n-gram is no longer what followed it before
    target.tokens["a"] += [7, 8]
    for _ in range(30):
        target.tokens["a"] += [7, 8]
        target.round()
    assert 0 < metrics.counts["draft_tokens"] - 9 * K < 15 * K, "drafts that were never accepted are no longer made"


@pytest.mark.parametrize(
    ("on_miss", "drafts", "expected"),
    [
        ("ngram", [8], [8, 9, 10, 7]),
        ("auto", [8, 9], [8, 9, 10, 7]),
        ("auto", [8, 5], [8, 5]),  # the n-gram goes on otherwise
        ("ngram", [8, 9, 10, 7], [8, 9, 10, 7]),
        ("skip", [8], [8]),
        ("wait", [8], [8]),
    ],
)
def test_ngram_drafts_extend_the_drafts_that_they_begin_with(on_miss, drafts, expected):
    row, round_ = round_of([7, 8, 9, 10, 7], drafts, max_drafts=4)
    make_fallback(on_miss).decide(round_, 1, client=None)
    assert row.drafts.token_ids == expected
    assert row.drafts.proposals == ["q"] * len(drafts) + [None] * (len(expected) - len(drafts))
    round_.hand_over()
    assert row.request.num_drafted == len(drafts)


def test_extensions_end_where_they_are_not_accepted():
    """Only rounds that accepted the drafts before them say what they are worth."""
    fallback = make_fallback("auto")

    def extended() -> bool:
        row, round_ = round_of([7, 8, 9, 10, 7], [8], max_drafts=4)
        fallback.decide(round_, 1, client=None)
        return len(row.drafts.token_ids) > 1

    for k in [1, 0] * 40:
        fallback.observe([1], [1 if k else 4], [k], seconds=0.01)
    assert extended(), "no n-gram draft was reached"
    for _ in range(40):
        fallback.observe([1], [4], [1], seconds=0.01)
    assert not extended()
    for _ in range(40):
        fallback.observe([0], [4], [4], seconds=0.01)  # n-gram drafts instead of none are another matter
    assert not extended()
    for _ in range(40):
        fallback.observe([1], [4], [4], seconds=0.01)
    assert extended()


def make_fallback(on_miss: str) -> Fallback:
    """A fallback whose every further draft costs 1 ms."""
    config = SSDConfig.from_user({"model": "x", "num_speculative_tokens": 4, "on_miss": on_miss, "ngram_min": 1})
    return Fallback(config, SimpleNamespace(draft_seconds=lambda batch_size: 1e-3))


def round_of(tokens: list[int], drafts: list[int], max_drafts: int) -> tuple[Row, Round]:
    """A round of one row that hit, with `drafts` of a known q."""
    batch = Batch(["a"], [0], [[tokens[-1]]], np.array([len(tokens)], np.int32), np.array([tokens], np.int32))
    speculation = Speculation(drafts, ["q"] * len(drafts))
    round_ = Round(0.0, batch, max_drafts)
    round_.rows = [Row(0, Request(RemoteRequest("a", 1.0)), len(tokens), tokens[-1:], max_drafts, speculation)]
    return round_.rows[0], round_


def test_rows_with_ngram_drafts_do_not_hurry_the_drafter():
    link = InProcessLink(steps_a_poll=2)
    verifier, metrics = make(link, on_miss="auto")
    target = FakeTarget(verifier)
    target.start("repeats", [7, 8, 9, 10] * 3)
    target.start("does not", [1, 2, 3])
    usual = target.next_token
    target.next_token = lambda prefix: prefix[-4] if prefix[0] == 7 else usual(prefix)
    for _ in range(30):
        target.round()
    outcomes = [e for s in link.steps for e in s.events if hasattr(e, "jit")]
    assert not any(e.jit and e.draft_token_ids for e in outcomes)
    assert any(e.jit for e in outcomes) and metrics.counts["waits"] > 0


def test_a_slow_drafter_is_late_and_harmless():
    link = InProcessLink(steps_a_poll=1)
    verifier, metrics = make(link, on_miss="skip")
    target = FakeTarget(verifier)
    for request_id, prompt in PROMPTS.items():
        target.start(request_id, prompt)
    for _ in range(40):
        target.round()
    target.check(PROMPTS)
    assert metrics.counts["late"] > 0


def test_death_and_return_of_the_drafter():
    link = InProcessLink()
    verifier, metrics = make(link, on_miss="wait")
    target = FakeTarget(verifier)
    for request_id, prompt in PROMPTS.items():
        target.start(request_id, prompt)
    for _ in range(10):
        target.round()
    hits = metrics.counts["hits"]
    link.die()
    for _ in range(10):
        target.round()
    assert metrics.counts["hits"] <= hits + len(PROMPTS)
    hits = metrics.counts["hits"]
    link.come_back()
    for _ in range(10):
        target.round()
    target.check(PROMPTS)
    assert metrics.counts["hits"] > hits + 10


def test_evicted_requests_pause_and_return():
    link = InProcessLink(num_pages=44)
    verifier, metrics = make(link, on_miss="skip")
    target = FakeTarget(verifier)
    prompts = {name: [i] * 30 for i, name in enumerate("abcd")}
    for request_id, prompt in prompts.items():
        target.start(request_id, prompt)
    for _ in range(30):
        target.round()
    target.check(prompts)
    assert link.engine.num_evictions > 0
    assert metrics.counts["hits"] > 0


def test_requests_longer_than_the_drafter_allows_run_without_drafts():
    link = InProcessLink(max_model_len=32)
    verifier, metrics = make(link, on_miss="wait")
    target = FakeTarget(verifier)
    prompts = {"short": [1, 2], "long": [3] * 30}
    for request_id, prompt in prompts.items():
        target.start(request_id, prompt)
    for _ in range(12):
        target.round()
        assert not target.drafts["long"]
    target.check(prompts)
    assert metrics.counts["hits"] > 0


def test_finished_requests_leave_the_drafter():
    link = InProcessLink()
    verifier, _ = make(link)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    target.round()
    target.finish("a")
    link.poll()
    assert not link.engine.sequences and link.engine.pages.num_free == 400


def test_stale_and_foreign_blocks_are_dropped():
    link = InProcessLink()
    verifier, metrics = make(link)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    branch = (0, pack_ids([0, 1]), pack_ids([2]))
    stale = Push(
        [
            SpeculationBlock("a", 7, 3, *branch),
            SpeculationBlock("a", 1, 4, *branch),
            SpeculationBlock("z", 1, 3, *branch),
        ],
        [Evicted("z", 1)],
        None,
    )
    link._drafter.send(stale)
    target.round()
    assert metrics.counts["stale_blocks"] == 3


def test_proposals_follow_the_drafts_that_are_verified():
    link = InProcessLink()
    verifier, _ = make(link, on_miss="skip")
    target = FakeTarget(verifier)
    target.start("hot", [1, 2, 3], temperature=0.7)
    target.start("cold", [1, 2, 4], temperature=0.0)
    for _ in range(30):
        target.round()
        if target.drafts["hot"]:
            break
    drafts = [target.drafts["hot"], target.drafts["cold"]]
    assert drafts[0]
    lengths = [len(target.tokens["hot"]), len(target.tokens["cold"])]
    rows = verifier.proposals(["hot", "cold"], lengths, drafts)
    for draft, proposal in zip(drafts[0], rows[0]):
        assert draft in proposal[0] and proposal[1].sum() == pytest.approx(1)
    assert rows[1] == [None] * len(drafts[1])
    assert verifier.proposals(["hot"], lengths[:1], [drafts[0][:1]]) is not None
    assert verifier.proposals(["hot"], lengths[:1], [[99]]) is None, "filler has no distribution"
    assert verifier.proposals(["hot"], [lengths[0] + 1], [drafts[0][:1]]) is None, "filler may look like old drafts"
    assert verifier.proposals(["cold"], lengths[1:], [drafts[1]]) is None


@pytest.mark.parametrize("on_miss", ["skip", "wait", "ngram"])
def test_no_round_reaches_over_min_tokens(on_miss):
    link = InProcessLink()
    verifier, metrics = make(link, on_miss=on_miss)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3], min_tokens=18)
    while len(target.tokens["a"]) < 40:
        target.round()
        length = len(target.tokens["a"])
        assert length >= 21 or length + len(target.drafts["a"]) < 21
    target.check({"a": [1, 2, 3]})
    assert metrics.counts["hits"] > 0
    assert not [e for s in link.steps for e in s.events if getattr(e, "jit", 0) and e.length == 20], "waited in vain"


def test_rounds_in_which_the_drafter_is_behind_are_told_apart(monkeypatch):
    """It reads a prompt, has rounds of plain decoding to catch up with, starts again, or says nothing for long."""
    link = InProcessLink()
    verifier, metrics = make(link, on_miss="skip", adaptive=True)
    learned, wanted = [], [K]
    monkeypatch.setattr(verifier._adaptation, "observe", lambda *round_: learned.append(round_[-1]))
    monkeypatch.setattr(verifier._adaptation, "choose", lambda batch_size: wanted[0])
    target = FakeTarget(verifier)

    def rounds(number: int, steps_a_poll: int = 50) -> list[bool]:
        link.steps_a_poll = steps_a_poll
        learned.clear()
        for _ in range(number):
            target.round()
        return list(learned)

    target.start("a", PROMPTS["a"])
    assert rounds(6, steps_a_poll=0) == [False] * 5, "the first says nothing in any case"
    assert rounds(6) == [False] + [True] * 5, "what a round is worth is decided as it begins"
    wanted[0] = 0
    assert rounds(10) == [True] * 10
    wanted[0] = K
    assert rounds(4, steps_a_poll=0) == [True] + [False] * 3, "the first was a plain round"
    assert rounds(3) == [False, True, True]
    hits = metrics.counts["hits"]
    silent = rounds(2 * SILENT_ROUNDS, steps_a_poll=0)
    assert silent == [True] * SILENT_ROUNDS + [False] * SILENT_ROUNDS, "it is late, or compiles"
    assert rounds(4) == [False] + [True] * 3 and metrics.counts["hits"] > hits
    target.start("b", PROMPTS["b"])
    assert rounds(5, steps_a_poll=0) == [False] * 4, "a prompt of one request keeps the drafter from the others"
    link.die()
    assert rounds(3) == []
    link.come_back()
    assert rounds(4, steps_a_poll=0) == [False] * 4
    rounds(1)
    assert rounds(2) == [True, True]
    target.check({name: PROMPTS[name] for name in "ab"})


def test_a_late_block_shows_that_the_prompt_was_read():
    """Or a drafter that is always late would never be judged."""
    link = InProcessLink()
    verifier, metrics = make(link, on_miss="skip", adaptive=True)
    target = FakeTarget(verifier)
    target.start("a", PROMPTS["a"])
    link.steps_a_poll = 0
    target.round()
    target.round()
    request = verifier._requests["a"].remote
    assert not verifier._client.in_time
    late = SpeculationBlock("a", request.epoch, len(PROMPTS["a"]), 0, pack_ids([0, 1]), pack_ids([1]))
    stale = metrics.counts["stale_blocks"]
    link._drafter.send(Push([late], [], None))
    verifier._client.poll()
    assert verifier._client.in_time and metrics.counts["stale_blocks"] == stale + 1
