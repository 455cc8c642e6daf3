"""Message transport between a target and its drafter: send, poll and close, none of which blocks the target.

A transport runs over a Unix stream socket on one machine, or over TLS (`vllm_ssd.link.tcp`). A frame is the length of
its message (4 bytes, little-endian), then the message. A message usually costs one system call to send and one to
receive.
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
"""Largest message of any transport; one end may receive with a lower limit."""
MAX_POLL_MESSAGES = 1024
"""Most messages that one `poll` returns; the rest waits for the next call."""
MIN_POLL_BYTES = 2 << 20
"""Most bytes that one `poll` reads, unless twice the message limit is more."""
PREFIX_BYTES = 4
SOCKET_BUFFER_BYTES = 8 << 20
INBOX_BYTES = 1 << 20
"""Initial size of the receive buffer, which grows as the bytes of a larger message arrive."""
SMALL_MESSAGES = 64
"""The receive buffer shrinks again after so many consecutive messages that fit its initial size."""
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
"""Flag of `send` that prevents SIGPIPE: a dead drafter must not kill a host with the default handler."""


class TransportClosed(ConnectionError):
    """Nothing more can be sent or received; the message says why."""


class Transport(ABC):
    """One end of an ordered, reliable two-way stream of protocol messages.

    Not thread-safe: one thread uses an end at a time.
    """

    @abstractmethod
    def send(self, message: Any) -> None:
        """Send without ever blocking.

        Bytes that the channel does not take yet wait in a bounded buffer, which later calls of `send` and `poll` empty.
        If the buffer overflows, the transport closes itself. Raises TransportClosed if the message can no longer be
        delivered; messages that have already arrived can still be polled, unless this end was closed.
        """

    @abstractmethod
    def poll(self, timeout_s: float | None = 0.0) -> list[Any]:
        """Flush the send buffer and return the complete messages that have arrived, oldest first.

        One call returns at most MAX_POLL_MESSAGES messages and reads at most MIN_POLL_BYTES or twice the message limit,
        whichever is more. Without a message it waits up to `timeout_s` seconds (None: forever), rounded up to whole
        milliseconds, then returns an empty list. Raises TransportClosed once all messages have been delivered and none
        can follow: the other end is gone, it sent something invalid, or this end was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Close this end at once and drop unsent bytes; idempotent."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that becomes readable when `poll` would return a message or raise; -1 once closed."""

    @property
    @abstractmethod
    def pending_bytes(self) -> int:
        """Bytes accepted by `send` that still wait in this end's buffer."""


class Stream(Protocol):
    """The part of a socket's interface that a transport uses; calls that would block raise BlockingIOError."""

    def setblocking(self, blocking: bool, /) -> None: ...

    def set_inheritable(self, inheritable: bool, /) -> None: ...

    def setsockopt(self, level: int, name: int, value: int, /) -> None: ...

    def fileno(self) -> int: ...

    def send(self, data: bytes | bytearray, flags: int, /) -> int: ...

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def close(self) -> None: ...


class ProcessTransport(Transport):
    """One end of a connected stream.

    side: who uses this end; max_pending_bytes: limit of the send buffer; max_message_bytes: largest message to receive
    """

    def __init__(
        self,
        sock: Stream,
        side: Literal["target", "drafter"],
        max_pending_bytes: int = DEFAULT_MAX_PENDING_BYTES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        sock.setblocking(False)
        sock.set_inheritable(False)  # a child that inherits this end would hide its closing from the other end
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
        """Close this end at once; `reason` is the message of later TransportClosed errors."""
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
        """Whether the last `poll` stopped at its limit of messages or bytes, with more left to read."""
        return self._inbox.at_bound

    @property
    def mid_message(self) -> bool:
        """Whether part of a message has arrived and the rest has not."""
        return self._inbox.mid_message

    def _enqueue(self, frame: bytes) -> None:
        """Write as much as the kernel takes, in order, and buffer the rest."""
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
        """Write to the socket and return how many bytes are done with: those it took, or all if the peer is gone."""
        try:
            return self._socket.send(data, NO_SIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._unsendable = f"the other end is gone: {error}"
            return len(data)


class Inbox:
    """Receive buffer that splits a byte stream into messages."""

    def __init__(self, decode: Callable[[memoryview], Any], max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.broken: str | None = None  # why nothing more will be received
        self.at_bound = False  # the last `receive` stopped at its limit of messages or bytes
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
        """Read without blocking and return the complete messages, up to the limits."""
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
        """Decode the complete messages and make room for the rest of an incomplete one."""
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
        """Make room for the next message, of `needed` bytes.

        The buffer grows with the bytes that have arrived, not with the announced size.
        """
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
    """Create the target's end, which receives messages up to `max_message_bytes`, and the socket for a child process.

    Pass the socket's `fileno()` to the child with `subprocess.Popen(pass_fds=...)`, then close it in this process:
    while it stays open here, the child's death goes unnoticed.
    """
    target, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return ProcessTransport(target, "target", max_message_bytes=max_message_bytes), child
