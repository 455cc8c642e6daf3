"""The connection of a listening drafter to its keeper, the process that keeps it running, such as a Ray actor.

The drafter reports its state to the keeper. When the keeper ends, the drafter ends too, because Ray will assign its GPU
to another. The exception is the end of Ray as a whole, noticed by its GCS (the registry) not answering: then the GPU
will not be reassigned, and the drafter serves until its last target has left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from vllm_ssd.drafter.tenants import Tenants
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.roster import Report

REPORT_S = 0.5
CONNECT_TIMEOUT_S = 2.0


class Keeper:
    """The drafter's end of the socket to its keeper, on a thread of its own."""

    def __init__(self, options: DrafterOptions) -> None:
        self._socket = socket.socket(fileno=options.keeper)
        self._socket.set_inheritable(False)
        self._socket.setblocking(False)
        host, _, port = options.registry.rpartition(":")
        self._registry = host.strip("[]"), int(port)
        self._address = ""
        self._tenants: Tenants | None = None
        self._end: Callable[[], None] = functools.partial(_end_while_it_loads, Path(options.key))
        self._report()
        threading.Thread(target=self._run, name="ssd-keeper", daemon=True).start()

    def fail(self, error: Exception) -> None:
        """Report why the drafter will not serve."""
        self._report(f"{type(error).__name__}: {error}")

    def serve(self, address: str, tenants: Tenants, end: Callable[[], None]) -> None:
        """Report from now on that the drafter listens at `address`, and its load; end: called to end the drafter."""
        self._end, self._tenants, self._address = end, tenants, address
        self._report()

    def _report(self, problem: str = "") -> None:
        targets, requests = self._tenants.load if self._tenants else (0, 0)
        report = Report(os.getpid(), self._address, targets, requests, problem[:1000])
        with contextlib.suppress(OSError):  # the keeper is gone, which `_run` notices, or does not read its reports
            self._socket.send(msgspec.json.encode(report) + b"\n")

    def _run(self) -> None:
        while not self._has_left():
            self._report()
        while self._has_targets() and not self._registry_answers():
            time.sleep(REPORT_S)
        self._end()

    def _has_left(self) -> bool:
        """Wait up to REPORT_S for the keeper to close the socket; it never sends anything."""
        if not select.select([self._socket], [], [], REPORT_S)[0]:
            return False
        try:
            return not self._socket.recv(1 << 10)
        except OSError:
            return True

    def _has_targets(self) -> bool:
        return self._tenants is not None and self._tenants.load[0] > 0

    def _registry_answers(self) -> bool:
        try:
            socket.create_connection(self._registry, CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True


def _end_while_it_loads(key: Path) -> None:
    """Remove the credential and its folder, since the keeper that wrote them is gone, and exit."""
    with contextlib.suppress(OSError):
        key.unlink()
        key.parent.rmdir()
    os._exit(0)
