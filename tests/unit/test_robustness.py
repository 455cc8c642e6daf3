"""What goes wrong between a target and its drafter costs speed, never text, and never a wait for nothing."""

from __future__ import annotations

from fake_link import InProcessLink
from test_verifier import FakeTarget, make

from vllm_ssd.protocol import Block, Push, pack_ids


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
