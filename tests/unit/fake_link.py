"""A drafter in this process, joined to the target by a socket."""

from __future__ import annotations

import select
import socket

import fake_model

from vllm_ssd.drafter.server import apply, build_engine
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import Push, Step
from vllm_ssd.link.transport import DEFAULT_MAX_PENDING_BYTES, ProcessTransport
from vllm_ssd.policy import FanOut

K = 3


def pair(max_pending_bytes: int = DEFAULT_MAX_PENDING_BYTES) -> tuple[ProcessTransport, ProcessTransport]:
    """The target's end and the drafter's, in one process."""
    target, drafter = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return (
        ProcessTransport(target, "target", max_pending_bytes),
        ProcessTransport(drafter, "drafter", max_pending_bytes),
    )


class InProcessLink:
    """A link whose drafter runs when it is polled: `steps_a_poll` forwards, none when it is dead."""

    leaving = False

    def __init__(self, num_pages: int = 400, steps_a_poll: int = 50, max_model_len: int = 200) -> None:
        self.generation, self.connected, self.max_model_len = 1, True, max_model_len
        self.steps_a_poll = steps_a_poll
        self.steps: list[Step] = []
        self._num_pages = num_pages
        self._restart()

    def _restart(self) -> None:
        self._target, self._drafter = pair()
        self.engine = build_engine(
            fake_model.FakePagedModel(self._num_pages, self.max_model_len),
            FanOut(K, 3),
            num_speculative_tokens=K,
            max_num_seqs=8,
            max_branches=3 * (K + 1),
            max_fan_out=3,
            top_m=5,
            seed=0,
        )

    def die(self) -> None:
        self.connected = False

    def come_back(self) -> None:
        self._restart()
        self.connected = True
        self.generation += 1

    def send(self, step: Step) -> None:
        self.steps.append(step)
        if self.connected:
            self._target.send(step)

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        if not self.connected:
            return []
        for step in self._drafter.poll():
            for event in step.events:
                apply(self.engine, event, step.num_speculative_tokens)
        for _ in range(self.steps_a_poll):
            if not self.engine.has_work:
                break
            push = self.engine.speculate()
            if push is not None:
                self._drafter.send(push)
        return self._target.poll()


class PolledFleet(Fleet):
    """A fleet whose drafters work when they are polled: nobody sleeps for long."""

    def wait(self, wakeup: int, timeout_s: float) -> None:
        select.select([wakeup], [], [], min(timeout_s, 0.002))
