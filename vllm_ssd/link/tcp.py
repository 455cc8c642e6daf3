"""Byte streams between hosts: mutual TLS over TCP, with the interface of a non-blocking socket."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from typing import Any

CONNECT_TIMEOUT_S = 5.0
"""Timeout of the TCP connection and, separately, of the TLS handshake."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 1, 1, 2
USER_TIMEOUT_MS = 2000
"""Time after which unacknowledged bytes break the connection, so that a network partition is noticed."""

HEADER_BYTES = 5
"""Size of a TLS record's header; its last two bytes are the length of the payload."""
BUFFER_BYTES = 256 << 10


def connect(address: tuple[str, int], context: ssl.SSLContext) -> TlsStream:
    """Connect and do the TLS handshake, each within CONNECT_TIMEOUT_S; raises OSError."""
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
    """Set `sock` to send without delay and to notice within about 2 s that its peer is gone; returns it."""
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

    Encrypts and decrypts in memory, to save system calls: a push of 62 kB is four TLS records, for which
    `ssl.SSLSocket` needs three calls each and this class one in total.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool = False) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._arrived, self._made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._made, server_side=server_side)
        self._buffer = memoryview(b"")
        self._drained = True  # the last read emptied the socket
        self._unsent = b""  # encrypted records that the socket has not taken yet
        self._record = b""  # the part of a handshake record read so far
        self._num_ahead = 0  # bytes that `send` has encrypted but not reported as sent

    def shake_hands(self) -> bool:
        """Continue the handshake and return whether it is complete; raises OSError.

        If not, call again when the descriptor is readable, or writable if `has_unsent`. Reads only the handshake's
        bytes, so that the descriptor stays readable if data follows.
        """
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    self._buffer = self._buffer or memoryview(bytearray(BUFFER_BYTES))  # only for authenticated peers
                    return self._flush()
                except ssl.SSLWantReadError:
                    if not self._flush() or not self._read_record():
                        return False
        except OSError:
            with contextlib.suppress(OSError):
                self._flush()  # send the TLS alert
            raise

    @property
    def has_unsent(self) -> bool:
        """Whether encrypted records wait for the socket to take them."""
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
        """Like `socket.send`; the caller must send uncounted bytes again, possibly followed by more.

        While encrypted records wait for the socket, one of their bytes stays uncounted, so that the caller comes back.
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
        """Like `socket.recv_into`; after a short count, no data is left that would not make the descriptor readable.

        A connection that ends without a TLS close_notify, as after a crash, counts as closed normally.
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
                except ssl.SSLWantReadError:  # an incomplete record
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
        """Write the encrypted records to the socket; returns whether it took them all."""
        self._unsent += self._made.read()
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self._socket.send(self._unsent, flags) :]
        return not self._unsent

    def _read_record(self) -> bool:
        """Read more of the current handshake record; returns whether there was anything.

        Raises ConnectionError at the end of the stream.
        """
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
