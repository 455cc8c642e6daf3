"""How messages travel between a target and its drafter: send, poll, close, and nothing that blocks the target.

A transport runs over a Unix stream socket between processes of one machine, or over TLS (`vllm_ssd.link.tcp`). A frame
is the length of its message (4 bytes, little-endian) and the message. In the common case a message costs one system
call to send and one to receive.
"""

from __future__ import annotations

import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Protocol

from vllm_ssd.link.protocol import ProtocolError, decode_to_drafter, decode_to_target, encode

DEFAULT_MAX_PENDING_BYTES = 64 << 20
MAX_MESSAGE_BYTES = 256 << 20
"""Largest message of any transport; an end may be given a lower bound for what it receives."""
MAX_POLL_MESSAGES = 1024
"""Messages that one `poll` returns at most; the rest waits for the next one."""
MIN_POLL_BYTES = 2 << 20
"""Bytes that one `poll` may read; where the largest message is over half of it, twice that message instead."""
PREFIX_BYTES = 4
SOCKET_BUFFER_BYTES = 8 << 20
INBOX_BYTES = 1 << 20
"""Initial size of the receive buffer, which grows as the bytes of a larger message arrive."""
SMALL_MESSAGES = 64
"""The buffer shrinks again after so many messages in a row that would not have needed it: pushes are of one size."""
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""A host that resets SIGPIPE to its default must not be killed by a dead drafter."""


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
        """Flush what waits to be sent and return the complete messages that have arrived, oldest first.

        A flood is returned in parts: one call stops after MAX_POLL_MESSAGES messages, or when it has read
        MIN_POLL_BYTES and twice the largest message. With no message there, wait for one up to `timeout_s` seconds,
        rounded up to whole milliseconds (None = forever), then return an empty list. Raises TransportClosed when
        nothing is left to deliver and nothing can arrive any more: the other end is gone, what it sent is not a
        message, or this end was closed.
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


class Stream(Protocol):
    """What a transport needs of a connected socket; without bytes or room, calls raise BlockingIOError."""

    def setblocking(self, blocking: bool, /) -> None: ...

    def set_inheritable(self, inheritable: bool, /) -> None: ...

    def setsockopt(self, level: int, name: int, value: int, /) -> None: ...

    def fileno(self) -> int: ...

    def send(self, data: bytes | bytearray, flags: int, /) -> int: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def close(self) -> None: ...


class ProcessTransport(Transport):
    """One end of a connected stream; `side` is who uses this end, `max_message_bytes` bounds what it receives."""

    def __init__(
        self,
        sock: Stream,
        side: Literal["target", "drafter"],
        max_pending_bytes: int = DEFAULT_MAX_PENDING_BYTES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        sock.setblocking(False)
        sock.set_inheritable(False)  # a grandchild that held this end would hide its death from the other
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self._socket = sock
        self._inbox = Inbox(decode_to_target if side == "target" else decode_to_drafter, max_message_bytes)
        self._outbox = bytearray()
        self._max_pending_bytes = max_pending_bytes
        self._unsendable: str | None = None
        self._poller = select.poll()
        self._poller.register(sock.fileno(), select.POLLIN)

    @classmethod
    def from_fd(cls, fd: int, side: Literal["target", "drafter"]) -> ProcessTransport:
        """Take over the inherited descriptor `fd` of a connected stream socket."""
        return cls(socket.socket(fileno=fd), side)

    def limit_messages(self, max_message_bytes: int) -> None:
        """Refuse messages over `max_message_bytes` from now on."""
        self._inbox.limit(max_message_bytes)

    def send(self, message: Any) -> None:
        data = encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            self.close(f"a message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
        if self._unsendable is None:
            self._enqueue(len(data).to_bytes(PREFIX_BYTES, "little") + data)
        if self._unsendable is not None:
            raise TransportClosed(self._unsendable)

    def poll(self, timeout_s: float | None = 0.0) -> list[Any]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._outbox:
                self._flush()
            messages = self._inbox.receive(self._socket)
            if messages:
                return messages
            if self._inbox.broken is not None:
                self.close(self._inbox.broken)
                raise TransportClosed(self._inbox.broken)
            wait_s = None if deadline is None else deadline - time.monotonic()
            if wait_s is not None and wait_s <= 0:
                return []
            self._poller.poll(wait_s and wait_s * 1e3)

    def close(self, reason: str = "this end is closed") -> None:
        """Close this end at once; `reason` is what later calls report."""
        self._socket.close()
        self._outbox.clear()
        self._unsendable = self._unsendable or reason
        self._inbox.broken = self._inbox.broken or reason

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending_bytes(self) -> int:
        return len(self._outbox)

    @property
    def received_bytes(self) -> int:
        """Bytes received since the start."""
        return self._inbox.received_bytes

    @property
    def at_bound(self) -> bool:
        """Whether the last `poll` stopped at its bound of messages or bytes instead of reading all there was."""
        return self._inbox.at_bound

    @property
    def mid_message(self) -> bool:
        """Whether part of a message has arrived and the rest has not."""
        return self._inbox.mid_message

    def _enqueue(self, frame: bytes) -> None:
        """Write what the kernel takes after everything older, and keep the rest."""
        if self._outbox:
            self._flush()
        sent = 0 if self._outbox else self._write(frame)
        if sent == len(frame):
            return
        self._outbox += memoryview(frame)[sent:]
        self._poller.modify(self._socket.fileno(), select.POLLIN | select.POLLOUT)
        if len(self._outbox) > self._max_pending_bytes:
            self.close(f"the other end does not read: {len(self._outbox)} bytes wait to be sent")

    def _flush(self) -> None:
        sent = self._write(self._outbox)
        del self._outbox[:sent]
        if not self._outbox:
            self._poller.modify(self._socket.fileno(), select.POLLIN)

    def _write(self, data: bytes | bytearray) -> int:
        """The number of bytes that left: those the kernel took, or all once nobody will read them."""
        try:
            return self._socket.send(data, NO_SIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._unsendable = f"the other end is gone: {error}"
            return len(data)


class Inbox:
    """Bytes on their way to becoming messages."""

    def __init__(self, decode: Callable[[memoryview], Any], max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.broken: str | None = None  # why nothing more will be received
        self.at_bound = False  # the last `receive` stopped at its bound of messages or bytes
        self.received_bytes = 0
        self._decode = decode
        self._buffer = memoryview(bytearray(INBOX_BYTES))
        self._start = self._end = 0
        self._undecoded = False  # complete messages may be left in the buffer
        self._num_small = 0  # messages in a row that had room in the initial buffer
        self.limit(max_message_bytes)

    def limit(self, max_message_bytes: int) -> None:
        """Refuse messages over `max_message_bytes` from now on."""
        self._max_message_bytes = min(max_message_bytes, MAX_MESSAGE_BYTES)
        self._max_poll_bytes = max(MIN_POLL_BYTES, 2 * self._max_message_bytes)

    @property
    def mid_message(self) -> bool:
        """Whether part of a message has arrived and the rest has not."""
        return self._end > self._start and not self._undecoded

    def receive(self, sock: Stream) -> list[Any]:
        """Read what has arrived, without blocking, and return the messages that are complete, within the bounds."""
        messages: list[Any] = []
        left = self._max_poll_bytes
        if self._undecoded:
            self._take_messages(messages)
        while self.broken is None and not self._undecoded and left > 0:
            try:
                count = sock.recv_into(self._buffer[self._end :])
            except BlockingIOError:
                break
            except OSError as error:
                self.broken = f"the other end is gone: {error}"
                break
            if count == 0:
                part = " in the middle of a message" if self._end > self._start else ""
                self.broken = f"the other end closed{part}"
                break
            self._end += count
            self.received_bytes += count
            left -= count
            full = self._end == len(self._buffer)
            self._take_messages(messages)
            if not full:
                break
        self.at_bound = self._undecoded or left <= 0
        return messages

    def _take_messages(self, messages: list[Any]) -> None:
        """Move the complete messages out and leave room for the rest of an incomplete one."""
        buffer, start, end = self._buffer, self._start, self._end
        needed = PREFIX_BYTES
        self._undecoded = False
        while end - start >= PREFIX_BYTES:
            if len(messages) >= MAX_POLL_MESSAGES:
                self._undecoded = True
                break
            size = int.from_bytes(buffer[start : start + PREFIX_BYTES], "little")
            if size > self._max_message_bytes:
                self.broken = f"not a message: {size} bytes announced"
                return
            needed = PREFIX_BYTES + size
            if end - start < needed:
                break
            try:
                messages.append(self._decode(buffer[start + PREFIX_BYTES : start + needed]))
            except ProtocolError as error:
                self.broken = str(error)
                return
            self._num_small = self._num_small + 1 if needed <= INBOX_BYTES else 0
            start += needed
            needed = PREFIX_BYTES
        self._start, self._end = start, end
        if not self._undecoded:
            self._make_room(needed)

    def _make_room(self, needed: int) -> None:
        """Leave room for the next message, of `needed` bytes; memory grows with what has arrived, not with `needed`."""
        buffer, start, size = self._buffer, self._start, self._end - self._start
        capacity = len(buffer)
        if size == capacity:
            capacity = min(needed, 2 * size)
        elif needed <= INBOX_BYTES and self._num_small >= SMALL_MESSAGES:
            capacity = INBOX_BYTES
        if capacity != len(buffer):
            self._buffer = memoryview(bytearray(capacity))
        if not size or start + needed > capacity or capacity != len(buffer):
            self._start, self._end = 0, size
            if size and (start or capacity != len(buffer)):
                self._buffer[:size] = buffer[start : start + size]


def socket_pair(max_message_bytes: int = MAX_MESSAGE_BYTES) -> tuple[ProcessTransport, socket.socket]:
    """The target's end, which takes messages up to `max_message_bytes`, and the end for a child process.

    Pass the child's `fileno()` through `subprocess.Popen(pass_fds=...)`, then close the socket in this process: while
    it stays open here, the child's death goes unnoticed.
    """
    target, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return ProcessTransport(target, "target", max_message_bytes=max_message_bytes), child
