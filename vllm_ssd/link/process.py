"""Start the drafter's process, watch it, and start it again when it dies."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref

import msgspec
import psutil

from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import Hello, Push, Refused, Step, Welcome
from vllm_ssd.link.transport import Transport, TransportClosed, socket_pair

HANG_S = 10.0
"""A drafter that was told something and has said nothing for so long, while it was listened to, is taken for hung."""
CRASH_S = 2.0
"""A drafter that crashed has this long to end, until it is taken for hung."""
EXIT_S = 10.0
"""A drafter whose socket has closed has this long to end by itself."""
BACKOFF_S = (1.0, 60.0)
"""First and longest pause before a drafter is started again; doubled with each failure."""


class DrafterFailed(RuntimeError):
    """The drafter never came up; the message is the one sentence the user needs."""


class DrafterProcess:
    """A link to one drafter process, which a thread of its own starts and restarts.

    `send` and `poll` never raise and never wait for a drafter that is gone: without one, steps are dropped and
    nothing is heard. `generation` grows when a new drafter has shaken hands.
    """

    def __init__(
        self,
        options: DrafterOptions,
        hello: Hello,
        *,
        environment: dict[str, str | None],
        startup_timeout_s: float,
        logger: logging.Logger,
        server_pid: int | None = None,
    ) -> None:
        self.generation = 0
        self.connected = False
        self.max_model_len = 0
        self._options = options
        self._hello = hello
        self._environment = environment
        self._startup_timeout_s = startup_timeout_s
        self._logger = logger
        # vLLM 0.32 leaves its workers behind when the server is killed; the drafter must not stay with them.
        self._server = next((p for p in psutil.Process().parents() if p.pid == server_pid), None)
        self._process: subprocess.Popen | None = None
        self._transport: Transport | None = None
        self._spoken = False  # since it was last heard
        self._polled_at = self._silent_since = 0.0
        self._failure: DrafterFailed | None = None
        self._wanted = threading.Event()  # set while a (new) drafter should be started
        self._settled = threading.Event()  # set once the first start has succeeded or failed
        self._closed = threading.Event()
        self._wanted.set()
        # The child asks the kernel to die with the *thread* that started it, so one thread starts them all.
        self._thread = threading.Thread(target=_supervise, args=(weakref.ref(self),), name="ssd-drafter", daemon=True)
        self._thread.start()
        atexit.register(_close_weakly, weakref.ref(self))

    def wait_until_ready(self) -> None:
        """Block until the first drafter has shaken hands; raises `DrafterFailed` when it does not."""
        self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def send(self, step: Step) -> None:
        """Tell the drafter of one target step; dropped while there is no drafter."""
        if self.connected:
            self._spoken = True
            try:
                self._transport.send(step)
            except TransportClosed as error:
                self._lost(str(error))

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        """What the drafter has pushed since the last call, waiting at most `timeout_s` when there is nothing."""
        if not self.connected:
            return []
        try:
            pushes = self._transport.poll(timeout_s)
        except TransportClosed as error:
            self._lost(str(error))
            return []
        if not all(isinstance(push, Push) for push in pushes):
            self._lost("said what only a handshake says")
            return []
        now = time.monotonic()
        if pushes or not self._spoken or now - self._polled_at > HANG_S / 2:
            self._silent_since = now  # heard it, asked nothing, or did not listen: a pause of the server's own
            self._spoken = self._spoken and not pushes
        elif now - self._silent_since > HANG_S:
            self._lost(f"said nothing for {HANG_S:.0f} s")
        self._polled_at = now
        return pushes

    def wait(self, wakeup: int, timeout_s: float) -> None:
        """Return when the drafter has said something, the descriptor `wakeup` is readable, or the time is over."""
        poller = select.poll()
        poller.register(wakeup, select.POLLIN)
        if self.connected:
            with contextlib.suppress(ValueError):  # closed meanwhile, by `close` on another thread
                poller.register(self._transport.fileno(), select.POLLIN)
        poller.poll(timeout_s * 1e3)

    def close(self) -> None:
        """End the drafter; idempotent, and called at exit."""
        self._closed.set()
        self._wanted.set()
        self.connected = False
        if self._transport is not None:
            self._transport.close()
        self._kill()

    def _is_orphan(self) -> bool:
        """Whether the server that this worker belongs to has ended."""
        try:
            return self._server is not None and self._server.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def _lost(self, reason: str) -> None:
        self.connected = False
        self._logger.warning("SSD drafter lost (%s); decoding goes on without drafts until it is back", reason)
        self._transport.close()
        self._wanted.set()

    def _do_without_trees(self) -> None:
        """Start no drafter with its own attention again if the one that was lost crashed, perhaps in it."""
        if not self._options.tree_attention:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CRASH_S)
        if self._process.returncode not in (None, 0, -signal.SIGKILL, -signal.SIGTERM):
            self._logger.warning("SSD: the drafter crashed; it is started again with vLLM's attention")
            self._options = msgspec.structs.replace(self._options, tree_attention=False)

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _start(self) -> None:
        """Start one drafter and shake hands; raises `DrafterFailed`."""
        self._kill()
        transport, child_socket = socket_pair()
        _run_on(self._options.cpus)
        with child_socket:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vllm_ssd.drafter",
                    str(child_socket.fileno()),
                    msgspec.json.encode(self._options).decode(),
                ],
                pass_fds=[child_socket.fileno()],
                env={k: v for k, v in {**os.environ, **self._environment}.items() if v is not None},
                stdin=subprocess.DEVNULL,
            )
        try:
            transport.send(self._hello)
            answers = transport.poll(self._startup_timeout_s)
        except TransportClosed as error:
            try:
                how = f"ended with status {self._process.wait(EXIT_S)}"
            except subprocess.TimeoutExpired:
                how = f"was lost ({error})"
            raise DrafterFailed(f"the SSD drafter {how} before it was ready; see its output above") from None
        if not answers:
            raise DrafterFailed(
                f"the SSD drafter was not ready within startup_timeout_s={self._startup_timeout_s:g}; "
                "raise it if the draft model loads slowly"
            )
        if isinstance(answers[0], Refused):
            raise DrafterFailed(f"the SSD drafter cannot serve: {answers[0].reason}")
        welcome: Welcome = answers[0]
        self._transport = transport
        self.max_model_len = welcome.max_model_len
        self._spoken = False
        self.generation += 1
        self.connected = True
        self._logger.info(
            "SSD drafter %d ready: pid %d, %d KV pages of %d tokens, at most %d tokens a request",
            self.generation,
            self._process.pid,
            welcome.num_pages,
            welcome.page_size,
            welcome.max_model_len,
        )


def _run_on(cpus: list[int]) -> None:
    """Bind this thread alone, and every child that it starts from its first instruction on; no `cpus` bind nothing."""
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
        missing = set(cpus) - os.sched_getaffinity(0)
    except OSError:
        missing = cpus
    if missing:
        raise DrafterFailed(f"drafter_cpus: the SSD drafter may not run on CPU {', '.join(map(str, sorted(missing)))}")


def _supervise(reference: weakref.ref[DrafterProcess]) -> None:
    """Start drafters for as long as the link lives; the first failure to start is final."""
    pause_s, lived_since = BACKOFF_S[0], math.inf
    while (link := reference()) is not None:
        wanted, closed = link._wanted, link._closed
        del link
        if not wanted.wait(timeout=1.0):
            link = reference()
            if link is not None and link._is_orphan():
                link.close()
                return
            continue
        link = reference()
        if link is None or closed.is_set():
            return
        wanted.clear()
        first = link.generation == 0
        if not first:
            lived = time.monotonic() - lived_since > BACKOFF_S[1]
            if lived_since < math.inf:
                link._do_without_trees()
            pause_s, lived_since = BACKOFF_S[0] if lived else min(2 * pause_s, BACKOFF_S[1]), math.inf
            link._kill()
            if closed.wait(pause_s):
                return
        try:
            link._start()
            lived_since = time.monotonic()
        except Exception as error:  # a thread that dies would leave the target without a drafter, unexplained
            link._kill()
            failure = error if isinstance(error, DrafterFailed) else DrafterFailed(f"the SSD drafter: {error}")
            if first:
                link._failure = failure
            else:
                link._logger.warning("%s; trying again", failure)
                wanted.set()
        if closed.is_set():
            link.close()
        link._settled.set()
        if link._failure is not None:
            return


def _close_weakly(reference: weakref.ref[DrafterProcess]) -> None:
    link = reference()
    if link is not None:
        link.close()
