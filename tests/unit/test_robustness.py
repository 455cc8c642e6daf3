"""What goes wrong between a target and its drafter costs speed, never text, and never a wait for nothing."""

from __future__ import annotations

from fake_link import InProcessLink
from test_verifier import FakeTarget, make

from vllm_ssd.protocol import Block, Evicted, Push, pack_ids
from vllm_ssd.sessions import REOPEN_ROUNDS


def test_a_request_id_that_comes_again_does_not_meet_its_old_blocks():
    link = InProcessLink(steps_a_poll=0)
    verifier, metrics = make(link)
    target = FakeTarget(verifier)
    target.start("a", [1, 2, 3])
    (opened,) = link.steps[-1].events
    target.finish("a")
    target.start("a", [4, 5, 6])
    link._drafter.send(Push([Block("a", opened.epoch, 3, 0, pack_ids([0, 1]), pack_ids([2]))], [], None))
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
