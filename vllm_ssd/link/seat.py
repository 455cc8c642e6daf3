"""A link to a drafter at an address that changes."""

from __future__ import annotations

import threading
import time
from typing import Any

from vllm_ssd.config import parse_address
from vllm_ssd.link.handshake import DrafterFailed
from vllm_ssd.link.process import WATCH_S
from vllm_ssd.link.remote import RemoteDrafter


class Seat(RemoteDrafter):
    """A `RemoteDrafter` whose address can change; without an address the seat is vacant and connects to nothing."""

    def __init__(self, address: str, *args: Any, **options: Any) -> None:
        self._vacant = False
        self._moved = threading.Event()
        super().__init__(address, *args, **options)

    @property
    def refusal(self) -> DrafterFailed | None:
        """Why the drafter refuses to serve this target; None if it does not."""
        return self._failure

    def move(self, address: str | None, leaving: bool = False) -> None:
        """Close the current link and connect to `address` from now on; None makes the seat vacant.

        With an unchanged address the link stays. Raises ValueError for an invalid address.
        """
        self.leaving = leaving
        before = None if self._vacant else self._name
        if address == before:
            return
        if before is not None:
            self._logger.info("SSD: the drafter at %s has left", before)
        if address is not None:
            self._address, self._name = parse_address(address), address
        self._vacant = address is None
        with self._lock:
            self.connected = False
            for drafter in (self._drafter, self._newcomer):
                if drafter is not None:
                    drafter.lost = True
                    drafter.transport.close()
        self._moved.set()
        self._wanted.set()

    def _launch(self) -> Any:
        self._moved.clear()
        if self._vacant:
            raise DrafterFailed("no drafter")
        return super()._launch()

    def _pause(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._ends() and not self._moved.is_set() and (left := deadline - time.monotonic()) > 0:
            self._moved.wait(min(left, WATCH_S))
        return self._closed.is_set()

    def _goes_on(self, failure: DrafterFailed | None) -> bool:
        if not self._vacant:
            return super()._goes_on(failure)
        self._failure = None
        if failure is None:  # vacated while this thread was connecting
            self._wanted.set()
        return not self._closed.is_set()
