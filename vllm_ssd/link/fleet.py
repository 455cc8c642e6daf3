"""The links to all drafters of one target; any drafter can serve any request."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from vllm_ssd.link.handshake import DrafterFailed
from vllm_ssd.link.protocol import Push, Step

READY_S = 0.05
"""Interval at which drafters are checked for readiness at startup."""


class Link(Protocol):
    """A connection to a drafter that may die and come back; `send` and `poll` never wait for a dead one nor raise."""

    generation: int
    """Increases with each drafter that comes up; 0 before the first."""
    connected: bool
    max_model_len: int
    leaving: bool
    """Whether the drafter will end soon and should get no new requests."""

    @property
    def suspect(self) -> bool:
        """Whether the drafter has been silent for so long that its requests should move to another."""
        ...

    def send(self, step: Step) -> None: ...

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        """Return the pushes since the last call; without any, wait up to `timeout_s` seconds."""
        ...

    def descriptor(self) -> int | None:
        """A descriptor that is readable when `poll` has pushes; None if it has some already, -1 without a drafter."""
        ...

    @property
    def settled(self) -> bool:
        """Whether `wait_until_ready` returns or raises at once."""
        ...

    def wait_until_ready(self) -> None:
        """Block until the first drafter has shaken hands; raises `DrafterFailed` if it fails to."""
        ...

    def close(self) -> None: ...


class Fleet:
    """Links that are polled, awaited and closed together, identified by index.

    min_ready: number of drafters that a server waits for at startup; all by default
    """

    def __init__(self, links: Sequence[Link], min_ready: int | None = None) -> None:
        self.links = list(links)
        self._min_ready = len(self.links) if min_ready is None else min_ready

    def __len__(self) -> int:
        return len(self.links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self.links)

    @property
    def connected(self) -> bool:
        """Whether any drafter is connected."""
        for link in self.links:  # twice per round on the hot path, where `any` with a generator is slower
            if link.connected:
                return True
        return False

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Push]]:
        """Return the pushes since the last call, each with its link's index; without any, wait up to `timeout_s`."""
        if len(self.links) == 1:
            return [(0, push) for push in self.links[0].poll(timeout_s)]
        deadline = time.monotonic() + timeout_s
        while True:
            pushes = [(index, push) for index, link in enumerate(self.links) for push in link.poll()]
            left = deadline - time.monotonic()
            if pushes or left <= 0 or not self.connected:
                return pushes
            self.wait(None, left)

    def wait(self, wakeup: int | None, timeout_s: float) -> None:
        """Wait until a drafter has pushed, the descriptor `wakeup` (if given) is readable, or the timeout expires."""
        poller = select.poll()
        if wakeup is not None:
            poller.register(wakeup, select.POLLIN)
        for link in self.links:
            descriptor = link.descriptor()
            if descriptor is None:
                return
            if descriptor >= 0:
                poller.register(descriptor, select.POLLIN)
        poller.poll(timeout_s * 1e3)

    def wait_until_ready(self) -> None:
        """Block until `min_ready` drafters have shaken hands; raises `DrafterFailed` once too many have failed."""
        waiting, left = self.links, self._min_ready
        if left == len(waiting):
            for link in waiting:
                link.wait_until_ready()
            return
        while left:
            for link in [link for link in waiting if link.settled]:
                waiting = [other for other in waiting if other is not link]
                try:
                    link.wait_until_ready()
                    left -= 1
                except DrafterFailed:
                    if len(waiting) < left:
                        raise
            time.sleep(READY_S)

    def close(self) -> None:
        """Close all links; idempotent."""
        for link in self.links:
            link.close()
