"""What goes wrong between a target and its drafter costs speed, never text, and never a wait for nothing."""

from __future__ import annotations

import time

import pytest
from fake_link import InProcessLink, K
from test_round import PROMPTS, FakeTarget, make

from vllm_ssd.link.protocol import Close, Evicted, Open, Outcome, Push, SpeculationBlock, Step, pack_ids
from vllm_ssd.target.requests import REOPEN_ROUNDS


def test_a_request_id_that_comes_again_does_not_meet_its_old_blocks():
    link = InProcessLink(steps_a_poll=0)
    verifier, metrics = make(link)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    (opened,) = link.steps[-1].events
    target.finish("a")
    target.start("a", [4, 5, 6])
    link._drafter.send(Push([SpeculationBlock("a", opened.epoch, 3, 0, pack_ids([0, 1]), pack_ids([2]))], [], None))
    target.round()
    assert metrics.counts["stale_blocks"] == 1


def test_ngram_drafts_of_an_evicted_request_do_not_reach_over_min_tokens():
    link = InProcessLink()
    verifier, _ = make(link, on_miss="ngram")
    target = FakeTarget(verifier)
    target.next_token = lambda prefix: 7
    target.start("a", [7] * 6, min_tokens=20)
    target.round()
    (opened,) = link.steps[0].events
    link._drafter.send(Push([], [Evicted("a", opened.epoch)], None))
    drafted = 0
    while len(target.tokens["a"]) < 26:
        target.round()
        length = len(target.tokens["a"])
        drafted += len(target.drafts["a"])
        assert length >= 26 or length + len(target.drafts["a"]) < 26
    assert drafted > 0


def test_an_eviction_that_is_reported_twice_counts_once():
    """The drafter answers every outcome of a request it has evicted, those that were under way as well."""
    link = InProcessLink(steps_a_poll=0)
    verifier, _ = make(link, on_miss="skip")
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    (opened,) = link.steps[0].events
    link._drafter.send(Push([], [Evicted("a", opened.epoch)] * 3, None))
    rounds = 0
    while len(link.steps) == 1:
        target.round()
        rounds += 1
    assert rounds == REOPEN_ROUNDS + 1


@pytest.mark.parametrize("on_miss", ["skip", "wait"])
def test_a_request_that_outgrows_the_drafter_is_closed_there_for_good(on_miss):
    link = InProcessLink(max_model_len=40)
    verifier, metrics = make(link, on_miss=on_miss)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    target.start("long", [4] * 40)
    while len(target.tokens["a"]) < 3 * 40:
        target.round()
    target.check({"a": [1, 2, 3], "long": [4] * 40})
    events = [event for step in link.steps for event in step.events]
    assert [event.request_id for event in events if isinstance(event, Open)] == ["a"]
    assert events[-1] == Close("a") and sum(isinstance(event, Close) for event in events) == 1
    assert metrics.counts["too_long"] == 2 and link.engine.num_evictions == 0 and not link.engine.sequences
    assert max(event.length for event in events if isinstance(event, Outcome)) <= 40 - 2 * K - 2
    waits = metrics.counts["waits"]
    target.round()
    assert metrics.counts["waits"] == waits


def test_a_drafter_that_comes_back_hears_of_the_ngram_drafts_under_verification():
    link = InProcessLink()
    verifier, _ = make(link, on_miss="ngram")
    target = FakeTarget(verifier)
    target.next_token = lambda prefix: 7
    target.start("a", [7] * 6)
    link.die()
    target.round()
    link.come_back()
    target.round()
    opened, outcome = link.steps[-1].events
    assert isinstance(opened, Open) and outcome.epoch == opened.epoch and not outcome.emitted
    assert outcome.draft_token_ids == target.drafts["a"] == [7] * K


def test_auto_does_not_wait_for_a_drafter_that_always_answers_too_late():
    link = InProcessLink()
    poll = link.poll
    link.poll = lambda timeout_s=0.0: time.sleep(timeout_s) or [] if timeout_s else poll()
    verifier, metrics = make(link, on_miss="auto", wait_ms=2)
    target = FakeTarget(verifier)
    for request_id, prompt in PROMPTS.items():
        target.start(request_id, prompt)
    for _ in range(40):
        target.round()
    target.check(PROMPTS)
    assert metrics.counts["misses"] > 10
    assert 1 <= metrics.counts["waits"] <= 3


@pytest.mark.parametrize("on_miss", ["wait", "auto"])
def test_a_drafter_that_dies_when_it_is_asked_just_in_time(on_miss):
    link = InProcessLink()
    verifier, metrics = make(link, on_miss=on_miss)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    send = link.send

    def send_and_die(step: Step) -> None:
        send(step)
        if any(getattr(event, "jit", 0) for event in step.events):
            link.die()

    link.send = send_and_die
    for _ in range(30):
        target.round()
    target.check({"a": [1, 2, 3]})
    assert not link.connected and metrics.counts["waits"] == 1


@pytest.mark.parametrize(
    "arrays",
    [
        (b"", pack_ids([1])),
        (pack_ids([0, 7]) + b"xyz", pack_ids([2])),
        (pack_ids([0, 7]), b""),
        (pack_ids([0, 7]), b"xyz"),
        (pack_ids([0, 7, 1, 7]), pack_ids([2, 3, 4])),
        (pack_ids([0, 7]) * 2, pack_ids([2])),
        (pack_ids([0, 7]), pack_ids([2]) + b"x"),
    ],
)
def test_broken_blocks_are_dropped(arrays):
    link = InProcessLink(steps_a_poll=0)
    verifier, metrics = make(link, on_miss="skip")
    target = FakeTarget(verifier)
    target.next_token = lambda prefix: 7
    target.start("a", [1, 2, 3])
    (opened,) = link.steps[0].events
    whole = SpeculationBlock("a", opened.epoch, 3, 0, pack_ids([1, 7]), pack_ids([2]))
    link._drafter.send(Push([SpeculationBlock("a", opened.epoch, 3, 0, *arrays), whole], [], None))
    target.round()
    assert not target.drafts["a"] and metrics.counts["stale_blocks"] == 1


@pytest.mark.parametrize("on_miss", ["wait", "auto"])
def test_a_request_that_is_opened_again_is_not_waited_for(on_miss):
    link = InProcessLink()
    verifier, metrics = make(link, on_miss=on_miss, wait_ms=1)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    link.die()
    target.round()
    link.come_back()
    waits = metrics.counts["waits"]
    target.round()
    assert isinstance(link.steps[-1].events[0], Open)
    assert metrics.counts["waits"] == waits, "waited for drafts that nobody was asked for"
