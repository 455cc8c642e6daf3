"""An actor that keeps one drafter running where Ray has placed it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_ssd.link.process import BACKOFF_S
from vllm_ssd.link.roster import Report
from vllm_ssd.pool import cluster
from vllm_ssd.pool.child import DrafterChild, start_process
from vllm_ssd.pool.spec import DrafterSpec, Status

LEAVE_S = 30.0
"""A leaving drafter ends after this time, or once it has had no request for NO_REQUEST_S."""
NO_REQUEST_S = 4.0
WATCH_S = 0.25


class DrafterActor:
    """Keeps a drafter running with a thread that restarts it; `status` and `leave` return at once."""

    start_process: Callable[..., Any] = staticmethod(start_process)

    def __init__(self, name: str, spec: bytes) -> None:
        self._spec = msgspec.json.decode(spec, type=DrafterSpec)
        host, registry = cluster.here()
        self._status = Status(name, node=host)
        self._lock = threading.Lock()  # guards the read-modify-write of the status
        self._child = DrafterChild(self._spec, host, registry, self._take_report, self.start_process)
        self._leaving = threading.Event()
        threading.Thread(target=self._keep, name="ssd-keeper", daemon=True).start()

    def status(self) -> bytes:
        """The drafter's `Status`, as JSON."""
        return msgspec.json.encode(self._status)

    def spec(self) -> bytes:
        """The `DrafterSpec` it was made with, as JSON."""
        return msgspec.json.encode(self._spec)

    def leave(self) -> None:
        """Take no new requests, and end once the current ones are done, or after LEAVE_S."""
        if not self._leaving.is_set():
            self._leaving.set()
            self._say(leaving=True)
            threading.Thread(target=self._drain, name="ssd-leave", daemon=True).start()

    def _keep(self) -> None:
        pause_s = BACKOFF_S[0]
        while not self._leaving.is_set():
            started = time.monotonic()
            self._say(starts=self._status.starts + 1)
            try:
                reason = self._child.run()
            except Exception as error:  # if this thread died, the actor would be without a drafter and not know why
                reason = f"{type(error).__name__}: {error}"
            self._say(address="", pid=0, targets=0, requests=0, problem=reason)
            pause_s = BACKOFF_S[0] if time.monotonic() - started > BACKOFF_S[1] else min(2 * pause_s, BACKOFF_S[1])
            self._leaving.wait(pause_s)

    def _take_report(self, report: Report) -> None:
        self._say(
            address=report.address,
            pid=report.pid,
            targets=report.targets,
            requests=report.requests,
            problem=report.problem or ("" if report.address else self._status.problem),
        )

    def _say(self, **changes: Any) -> None:
        with self._lock:
            self._status = msgspec.structs.replace(self._status, **changes)

    def _drain(self) -> None:
        deadline = busy_at = time.monotonic()
        deadline += LEAVE_S
        while self._status.address and time.monotonic() < min(deadline, busy_at + NO_REQUEST_S):
            if self._status.requests:
                busy_at = time.monotonic()
            time.sleep(WATCH_S)
        self._child.stop()
        cluster.end_this_actor()
