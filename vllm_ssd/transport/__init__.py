"""How messages travel between a target and its drafter: send, poll, close, and nothing that blocks the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

DEFAULT_MAX_PENDING_BYTES = 64 << 20


class TransportClosed(ConnectionError):
    """Nothing more can be sent or will arrive; the message says why."""


class Transport(ABC):
    """One end of an ordered, reliable two-way stream of protocol messages.

    Not thread-safe: one thread uses an end at a time.
    """

    @abstractmethod
    def send(self, message: Any) -> None:
        """Send without ever blocking.

        What the channel does not take now waits in a bounded buffer, which later calls of `send` and `poll` empty. Over
        the bound the transport closes itself. Raises TransportClosed when the message can no longer be delivered;
        messages that had already arrived can then still be polled, unless this end was closed.
        """

    @abstractmethod
    def poll(self, timeout_s: float | None = 0.0) -> list[Any]:
        """Flush what waits to be sent and return all complete messages that have arrived, oldest first.

        With none there, wait for one up to `timeout_s` seconds, rounded up to whole milliseconds (None = forever), then
        return an empty list. Raises TransportClosed when nothing is left to deliver and nothing can arrive any more:
        the other end is gone, what it sent is not a message, or this end was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Close this end at once, dropping what was not sent; closing again does nothing."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable when `poll` has something to deliver or raise; -1 once closed."""

    @property
    @abstractmethod
    def pending_bytes(self) -> int:
        """Bytes accepted by `send` that wait in this end's buffer."""
