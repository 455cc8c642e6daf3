"""Accept connections of targets on other hosts; a thread does the TLS handshakes, so that slow peers delay nobody."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import selectors
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field

from vllm_ssd.link.tcp import CONNECT_TIMEOUT_S, TlsStream, tuned

MAX_HANDSHAKES = 128
"""Most concurrent handshakes; one more drops the oldest."""
TICK_S = 0.2


@dataclass(slots=True, eq=False)
class Handshake:
    """A connection that is not authenticated yet."""

    stream: TlsStream
    peer: str
    deadline: float = field(default_factory=lambda: time.monotonic() + CONNECT_TIMEOUT_S)


class Acceptor:
    """Listens on an address; `take` returns the connections that have completed their handshake since the last call.

    Raises OSError if the address cannot be bound.
    """

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, logger: logging.Logger) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._listener = socket.create_server(address, family=family, backlog=MAX_HANDSHAKES)
        self._listener.setblocking(False)
        self._context = context
        self._logger = logger
        self._accepted: queue.SimpleQueue[tuple[TlsStream, str]] = queue.SimpleQueue()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._handshakes: dict[int, Handshake] = {}  # by descriptor, oldest first
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ssd-accept", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """The address it listens on, with the actual port if 0 was asked for."""
        return self._listener.getsockname()[:2]

    def fileno(self) -> int:
        """A descriptor that is readable when `take` has connections."""
        return self._wakeup

    def take(self) -> list[tuple[TlsStream, str]]:
        """Connections that have authenticated with the credential, each with the peer's address."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        taken = []
        with contextlib.suppress(queue.Empty):
            while True:
                taken.append(self._accepted.get_nowait())
        return taken

    def close(self) -> None:
        """Stop listening and close the connections that were not taken."""
        self._closed = True
        self._thread.join()
        for stream, _ in self.take():
            stream.close()
        os.close(self._wakeup)

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(TICK_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._advance(key.data)
            now = time.monotonic()
            for handshake in [h for h in self._handshakes.values() if h.deadline < now]:
                self._refuse(handshake, f"no handshake within {CONNECT_TIMEOUT_S:g} s")
        for handshake in list(self._handshakes.values()):
            self._forget(handshake).close()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # no descriptors left: it stays queued, retry later
                time.sleep(TICK_S)
            return
        try:
            sock.setblocking(False)
            stream = TlsStream(tuned(sock), self._context, server_side=True)
        except OSError:
            sock.close()
            return
        handshake = Handshake(stream, f"{address[0]}:{address[1]}")
        if len(self._handshakes) >= MAX_HANDSHAKES:
            self._refuse(next(iter(self._handshakes.values())), "too many connections at once")
        self._handshakes[stream.fileno()] = handshake
        self._selector.register(stream, selectors.EVENT_READ, handshake)

    def _advance(self, handshake: Handshake) -> None:
        stream = handshake.stream
        if self._handshakes.get(stream.fileno()) is not handshake:  # dropped in the meantime
            return
        try:
            is_over = stream.shake_hands()
        except OSError as error:  # includes TLS errors
            self._refuse(handshake, getattr(error, "reason", None) or str(error))
            return
        if is_over:
            self._forget(handshake)
            self._accepted.put((stream, handshake.peer))
            os.eventfd_write(self._wakeup, 1)
        else:
            self._selector.modify(
                stream, selectors.EVENT_WRITE if stream.has_unsent else selectors.EVENT_READ, handshake
            )

    def _refuse(self, handshake: Handshake, reason: str) -> None:
        self._logger.info("SSD: refused a connection from %s: %s", handshake.peer, reason)
        self._forget(handshake).close()

    def _forget(self, handshake: Handshake) -> TlsStream:
        self._selector.unregister(handshake.stream)
        return self._handshakes.pop(handshake.stream.fileno()).stream
