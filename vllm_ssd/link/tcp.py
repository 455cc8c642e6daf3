"""Byte streams between hosts: TCP under mutual TLS, with the interface of a non-blocking socket."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from typing import Any

CONNECT_TIMEOUT_S = 5.0
"""A host that does not answer, or a handshake that does not end, is given up after so long."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 1, 1, 2
USER_TIMEOUT_MS = 2000
"""Bytes that the other host does not acknowledge for so long break the connection: a partition is noticed."""

HEADER_BYTES = 5
"""Of a record, the last two of which are the length of what follows."""
BUFFER_BYTES = 256 << 10


def connect(address: tuple[str, int], context: ssl.SSLContext) -> TlsStream:
    """Connect and shake hands, within CONNECT_TIMEOUT_S each; raises OSError."""
    sock = socket.create_connection(address, CONNECT_TIMEOUT_S)
    try:
        stream = TlsStream(tuned(sock), context)
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while not stream.shake_hands():
            left = deadline - time.monotonic()
            if left <= 0 or not any(select.select([stream], [stream] if stream.has_unsent else [], [], left)):
                raise TimeoutError("the handshake timed out")
        return stream
    except BaseException:
        sock.close()
        raise


def tuned(sock: socket.socket) -> socket.socket:
    """`sock`, which sends at once and notices that its other end is gone within some 2 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


class TlsStream:
    """A TLS connection that behaves like a non-blocking socket, once `shake_hands` has returned True.

    A push of 62 kB is four records. `ssl.SSLSocket` has three system calls for each, this one for all: records are made
    and read in memory.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool = False) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._arrived, self._made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._made, server_side=server_side)
        self._buffer = memoryview(b"")
        self._drained = True  # the socket had no more when it was read last
        self._unsent = b""  # records
        self._record = b""  # read so far, in the handshake
        self._num_ahead = 0  # bytes that `send` has encrypted and not counted

    def shake_hands(self) -> bool:
        """Go on with the handshake; whether it is over. Until then, wait to read, or to write if `has_unsent`.

        Raises OSError. No more is read than belongs to it: the descriptor stays readable for what follows.
        """
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    self._buffer = self._buffer or memoryview(bytearray(BUFFER_BYTES))  # who is not proven has none
                    return self._flush()
                except ssl.SSLWantReadError:
                    if not self._flush() or not self._read_record():
                        return False
        except OSError:
            with contextlib.suppress(OSError):
                self._flush()  # it says why
            raise

    @property
    def has_unsent(self) -> bool:
        """Whether records wait for the socket to take them."""
        return bool(self._unsent)

    def setblocking(self, blocking: bool) -> None:
        self._socket.setblocking(blocking)

    def set_inheritable(self, inheritable: bool) -> None:
        self._socket.set_inheritable(inheritable)

    def setsockopt(self, *args: Any) -> None:
        self._socket.setsockopt(*args)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes | bytearray, flags: int = 0) -> int:
        """As `socket.send`; what was not counted must be sent again, perhaps followed by more.

        While records wait for the socket, a byte is not counted that is in them, so that the caller comes again.
        """
        if not self._flush(flags):
            raise BlockingIOError
        count, self._num_ahead = self._num_ahead, 0
        with memoryview(data) as view:
            while count < len(view):
                end = min(count + BUFFER_BYTES, len(view))
                while count < end:
                    count += self._tls.write(view[count:end])
                if not self._flush(flags):
                    self._num_ahead = 1
                    if count == 1:
                        raise BlockingIOError
                    return count - 1
        return count

    def recv_into(self, buffer: memoryview) -> int:
        """As `socket.recv_into`; a short count means that the descriptor will be readable before there is more.

        An end without TLS's farewell, as after a crash, is an end like any other.
        """
        count, size = 0, len(buffer)
        while count < size:
            if self._arrived.pending or self._tls.pending():
                try:
                    received = self._tls.read(size - count, buffer[count:])  # pyright: ignore[reportArgumentType]
                    if not received:
                        break
                    count += int(received)
                    continue
                except ssl.SSLWantReadError:  # a part of a record
                    pass
                except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                    break
            if self._drained and count:
                break
            try:
                num_bytes = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                self._drained = True
                if not count:
                    raise
                break
            if not num_bytes:
                break
            self._drained = num_bytes < BUFFER_BYTES
            self._arrived.write(self._buffer[:num_bytes])
        return count

    def _flush(self, flags: int = 0) -> bool:
        """Give the socket what was made; whether it took all."""
        self._unsent += self._made.read()
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self._socket.send(self._unsent, flags) :]
        return not self._unsent

    def _read_record(self) -> bool:
        """Read on in one record; whether anything was there. Raises ConnectionError at the end."""
        size = HEADER_BYTES
        if len(self._record) >= HEADER_BYTES:
            size += int.from_bytes(self._record[3:HEADER_BYTES], "big")
        if len(self._record) >= size:
            self._record, size = b"", HEADER_BYTES
        try:
            data = self._socket.recv(size - len(self._record))
        except BlockingIOError:
            return False
        if not data:
            raise ConnectionError("the other end closed in the handshake")
        self._arrived.write(data)
        self._record += data
        return True
