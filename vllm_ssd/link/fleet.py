"""The drafters of one target, any of which can draft for any request."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from vllm_ssd.link.handshake import DrafterFailed
from vllm_ssd.link.protocol import Push, Step

READY_S = 0.05
"""How often drafters are asked at start whether they are ready."""


class Link(Protocol):
    """A connection to a drafter that may die and come back; `send` and `poll` never block for it and never raise."""

    generation: int
    """Grows whenever a new drafter has come up; 0 while there never was one."""
    connected: bool
    max_model_len: int
    leaving: bool
    """Whether it will be gone soon, and had better get no new requests."""

    @property
    def suspect(self) -> bool:
        """Whether the drafter owes an answer for so long that its requests had better go to another."""
        ...

    def send(self, step: Step) -> None: ...

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        """What the drafter has pushed since the last call, waiting at most `timeout_s` when there is nothing."""
        ...

    def descriptor(self) -> int | None:
        """A file descriptor that is readable when `poll` has news, or None when it has some already; -1 for none."""
        ...

    @property
    def settled(self) -> bool:
        """Whether `wait_until_ready` returns or raises at once."""
        ...

    def wait_until_ready(self) -> None:
        """Block until the drafter has shaken hands for the first time; raises when it does not."""
        ...

    def close(self) -> None: ...


class Fleet:
    """Links that are polled, waited for and closed together; they are known by their index.

    min_ready: drafters that a server does not start without; all by default
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
        """Whether there is any drafter now."""
        for link in self.links:  # asked twice a round: a generator costs more
            if link.connected:
                return True
        return False

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Push]]:
        """What the drafters have pushed since the last call, each with its link's index.

        Waits at most `timeout_s` seconds when no drafter has news.
        """
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
        """Return when a drafter has said something, `wakeup`, if any, is readable, or time is over."""
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
        """Block until as many drafters as are needed have shaken hands; raises what one raises when they cannot."""
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
        """End the links; idempotent."""
        for link in self.links:
            link.close()
