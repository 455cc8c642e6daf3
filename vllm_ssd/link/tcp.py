"""Byte streams between hosts: TCP under mutual TLS, with the interface of a non-blocking socket."""

from __future__ import annotations

import socket
import ssl
from typing import Any

CONNECT_TIMEOUT_S = 5.0
"""A host that does not answer, or a handshake that does not end, is given up after so long."""
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 1, 1, 2
USER_TIMEOUT_MS = 2000
"""Bytes that the other host does not acknowledge for so long break the connection: a partition is noticed."""


def connect(address: tuple[str, int], context: ssl.SSLContext) -> TlsStream:
    """Connect and shake hands, within CONNECT_TIMEOUT_S each; raises OSError."""
    sock = socket.create_connection(address, CONNECT_TIMEOUT_S)
    try:
        return TlsStream(context.wrap_socket(tuned(sock)))
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
    """A TLS connection that behaves like a non-blocking socket.

    What TLS has decrypted never waits unseen: `recv_into` fills the buffer until it is full or nothing is left, so that
    a short count means that the descriptor will be readable before there is more.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._socket = sock
        self._socket.setblocking(False)

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
        """As `socket.send`; what raised BlockingIOError must be sent again, perhaps followed by more."""
        count = 0
        with memoryview(data) as view:
            while count < len(view):
                try:
                    count += self._socket.send(view[count:])
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    if not count:
                        raise BlockingIOError from None
                    break
        return count

    def recv_into(self, buffer: memoryview) -> int:
        """As `socket.recv_into`; an end without TLS's farewell, as after a crash, is an end like any other."""
        count = 0
        while count < len(buffer):
            try:
                received = self._socket.recv_into(buffer[count:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not count:
                    raise BlockingIOError from None
                break
            except ssl.SSLEOFError:
                break
            if not received:
                break
            count += received
        return count
