"""Heartbeats while the drafter compiles, which a target that waits for an answer would otherwise take for a hang."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType
from typing import Any

from vllm_ssd.link.protocol import Push
from vllm_ssd.link.transport import Transport, TransportClosed

COMPILERS = ("triton.compiler.", "torch._dynamo.convert_frame", "torch._inductor.compile_fx")
"""Modules that are on the stack during compilation, but not while compiled code runs."""
CAPTURES = {("torch.cuda.graphs", name) for name in ("capture_begin", "capture_end", "instantiate")}
"""Functions that are on the stack while a CUDA graph is captured, but not while it is replayed."""
INTERVAL_S = 2.0
"""Interval of heartbeats."""
MAX_COMPILE_S = 300.0
"""Heartbeats stop after so long, so that a hung compilation is noticed."""


class Heartbeat(Transport):
    """Wraps the transport of the creating thread; a watcher thread sends empty pushes while that thread compiles.

    A hang in anything but compilation stays silent. `close` ends the watcher thread, but leaves the transport open.
    """

    def __init__(self, transport: Transport, interval_s: float = INTERVAL_S) -> None:
        self._transport = transport
        self._interval_s = interval_s
        self._lock = threading.Lock()  # transports are not thread-safe
        self._owner = threading.get_ident()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="ssd-heartbeat", daemon=True).start()

    def send(self, message: Any) -> None:
        with self._lock:
            self._transport.send(message)

    def poll(self, timeout_s: float | None = 0.0) -> list[Any]:
        with self._lock:
            return self._transport.poll(timeout_s)

    def close(self) -> None:
        self._closed.set()

    def fileno(self) -> int:
        return self._transport.fileno()

    @property
    def pending_bytes(self) -> int:
        return self._transport.pending_bytes

    def _watch(self) -> None:
        since: float | None = None
        while not self._closed.wait(self._interval_s):
            if not is_compiling(sys._current_frames().get(self._owner)):
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > MAX_COMPILE_S or not self._lock.acquire(blocking=False):
                continue  # whoever holds the lock is using the transport itself
            try:
                self._transport.send(Push([], [], None))
            except TransportClosed:
                return
            finally:
                self._lock.release()


def is_compiling(frame: FrameType | None) -> bool:
    """Whether the thread with the innermost frame `frame` is compiling a kernel or capturing a CUDA graph."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(COMPILERS) or (module, frame.f_code.co_name) in CAPTURES:
            return True
        frame = frame.f_back
    return False
