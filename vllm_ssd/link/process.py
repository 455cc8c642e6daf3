"""Start the drafter's process, watch it, and restart it when it dies.

Each `DrafterProcess` is used by two threads. Its own *supervisor* thread starts, watches and ends processes; the
*target's thread* calls `send` and `poll`. The supervisor stores a drafter that has shaken hands in `_newcomer`, and the
target's thread switches to it in `poll`. So `generation` does not change between two polls, and all events of a step
reach the drafter that they were meant for. Only while the target is idle, and does not poll, the supervisor switches
and polls in its place, so that drafters are replaced and statistics are read without any request. One lock guards the
shared state; the supervisor never holds it for longer than one bounded poll.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from vllm_ssd.link.checks import PushChecker, max_push_bytes
from vllm_ssd.link.environment import drafter_environment
from vllm_ssd.link.handshake import DrafterFailed, shake_hands
from vllm_ssd.link.lifetime import Ancestor
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.placement import NO_UTILIZATION, run_on
from vllm_ssd.link.protocol import DrafterStats, Hello, Push, Step, Welcome
from vllm_ssd.link.transport import ProcessTransport, TransportClosed, socket_pair

DRAFTER_MODULE = "vllm_ssd.drafter"
"""The drafter's module for `python -m`; its arguments are its socket's descriptor and its options."""
HANG_S = 10.0
"""A drafter counts as hung if it owes an answer and is silent for so long while it is being polled."""
SUSPECT_S = 2.0
"""After so much silence its requests move to another drafter, if there is one. A healthy drafter pushes each second."""
CRASH_S = 2.0
"""Time for a crashed drafter to exit before it counts as hung."""
EXIT_S = 10.0
"""Time for a drafter to exit by itself after its socket has closed."""
BACKOFF_S = (1.0, 60.0)
"""First and longest pause before a drafter is restarted; doubled with each failure."""
WATCH_S = 0.5
"""Interval at which the supervisor checks the drafter's and the server's process. A target that polls less often counts
as idle."""
MAX_FULL_POLLS = 16
"""A drafter is lost for flooding the target if so many consecutive polls reach their limit."""
GIB = 1 << 30
MAX_IDLE_BYTES = 16 << 20
"""Most bytes that the supervisor reads for an idle target's next poll; the rest stays in the socket."""


@dataclass(slots=True, eq=False)
class Drafter:
    """One drafter process that has shaken hands."""

    transport: ProcessTransport
    generation: int
    max_model_len: int
    lost: bool = False  # its loss has been handled, by either thread


class DrafterProcess:
    """A link to one drafter process, which a supervisor thread starts and restarts.

    `send` and `poll` never raise and never wait for a dead drafter: without one, steps are dropped and `poll` returns
    nothing. All pushes are validated by value, and a drafter that sends an invalid one is replaced. `generation`
    increases with each drafter that has shaken hands.

    on_stats: called with a drafter's statistics and generation; `poll` then leaves the statistics out
    on_end: called once, when the link is closed or garbage collected, or the server has ended
    """

    leaving = False

    def __init__(
        self,
        options: DrafterOptions,
        hello: Hello,
        *,
        environment: dict[str, str | None],
        startup_timeout_s: float,
        logger: logging.Logger,
        server_pid: int | None = None,
        on_stats: Callable[[DrafterStats, int], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.generation = 0
        self.connected = False
        self.max_model_len = 0
        self._options = options
        self._hello = hello
        self._checker = PushChecker.of(options, hello.vocab_size)
        self._environment = environment
        self._startup_timeout_s = startup_timeout_s
        self._logger = logger
        self._on_stats = on_stats
        # vLLM 0.32 leaves its workers behind when the server is killed; the drafter must exit nevertheless.
        self._server = Ancestor(server_pid)
        self._process: subprocess.Popen | None = None  # written by the supervisor
        self._num_started = 0  # written by the supervisor: drafters that have shaken hands
        self._kv_bytes = 0  # of the latest drafter
        self._resting = False  # written by the target's thread: no drafter is wanted
        self._lock = threading.RLock()
        self._newcomer: Drafter | None = None
        self._drafter: Drafter | None = None
        self._kept: list[Push] = []  # read while the target was idle
        self._kept_bytes = 0
        self._awaiting_reply = False
        self._listened_at = self._heard_at = 0.0
        self._polled_at = -math.inf  # by the target, not the supervisor
        self._full_polls = 0
        self._failure: DrafterFailed | None = None
        self._wanted = threading.Event()  # set while a (new) drafter should be started
        self._settled = threading.Event()  # set once the first start has succeeded or failed
        self._closed = threading.Event()
        self._wanted.set()
        self._end = weakref.finalize(self, on_end or (lambda: None))
        # PR_SET_PDEATHSIG follows the *thread* that started the child, so one long-lived thread starts them all.
        self._thread = threading.Thread(target=_supervise, args=(weakref.ref(self),), name="ssd-drafter", daemon=True)
        self._thread.start()
        atexit.register(_close_weakly, weakref.ref(self))

    # ---- the target's thread ---------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether `wait_until_ready` returns or raises at once."""
        return self._settled.is_set()

    def wait_until_ready(self) -> None:
        """Block until the first drafter has shaken hands; raises `DrafterFailed` if it fails to."""
        self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def send(self, step: Step) -> None:
        """Send one target step to the drafter; without a drafter it is dropped."""
        with self._lock:
            drafter = self._drafter
            if not self.connected or drafter is None:
                return
            self._awaiting_reply = True
            try:
                drafter.transport.send(step)
            except TransportClosed as error:
                self._lose(drafter, str(error))

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        """Return the pushes since the last call; without any, wait up to `timeout_s` seconds."""
        with self._lock:
            self._take_up()
            kept, self._kept, self._kept_bytes = self._kept, [], 0
            pushes = self._listen(0.0 if kept else timeout_s)
            self._polled_at = time.monotonic()
            return kept + pushes if self.connected else []

    @property
    def suspect(self) -> bool:
        """Whether the drafter owes an answer and has been silent for SUSPECT_S while it was polled."""
        return self.connected and self._awaiting_reply and self._listened_at - self._heard_at > SUSPECT_S

    def descriptor(self) -> int | None:
        """A descriptor that is readable when `poll` has pushes; None if it has some already, -1 without a drafter."""
        drafter = self._drafter
        if not self.connected or drafter is None:
            return -1
        return None if self._kept or drafter.transport.at_bound else drafter.transport.fileno()

    def rest(self) -> None:
        """End the drafter to free its memory, and start no other until `wake`."""
        self._resting = True
        self._kill()  # first, as in `close`
        with self._lock:
            self.connected = False
            for drafter in (self._drafter, self._newcomer):
                if drafter is not None:
                    drafter.lost = True
                    drafter.transport.close()
            self._newcomer = None

    def wake(self) -> None:
        """Start a drafter again after `rest`; until it is ready, decoding continues without drafts."""
        if self._resting:
            self._resting = False
            self._wanted.set()

    def keep_size(self) -> None:
        """Give later drafters the KV memory of the current one: the target may have claimed some of the free memory."""
        engine_args = self._options.engine_args | {
            "kv_cache_memory_bytes": self._kv_bytes,
            "gpu_memory_utilization": NO_UTILIZATION,
        }
        self._options = msgspec.structs.replace(self._options, engine_args=engine_args)

    def close(self) -> None:
        """End the drafter; idempotent. Also called at interpreter exit."""
        self._closed.set()
        self._wanted.set()
        self.connected = False
        self._kill()  # before taking the lock: a thread waiting in `poll` holds it until the drafter hangs up
        with self._lock:
            for drafter in (self._drafter, self._newcomer):
                if drafter is not None:
                    drafter.transport.close()
        self._end()

    # ---- under the lock --------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Switch to `_newcomer`, if there is one."""
        if self._newcomer is None or self._closed.is_set():
            return
        if self._drafter is not None:
            self._drafter.transport.close()
        self._drafter, self._newcomer = self._newcomer, None
        self._kept, self._kept_bytes = [], 0
        self._awaiting_reply, self._full_polls = False, 0
        self._listened_at = self._heard_at = time.monotonic()
        self.max_model_len = self._drafter.max_model_len
        self.generation = self._drafter.generation
        self.connected = not self._drafter.lost

    def _listen(self, timeout_s: float) -> list[Push]:
        """Poll the drafter and validate its pushes; give it up if it is gone, hung or sent something invalid."""
        drafter = self._drafter
        if not self.connected or drafter is None:
            return []
        try:
            pushes = drafter.transport.poll(timeout_s)
        except TransportClosed as error:
            self._lose(drafter, str(error))
            return []
        for i, push in enumerate(pushes):
            reason = self._checker.reason(push) if isinstance(push, Push) else "what only a handshake sends"
            if reason is not None:
                self._lose(drafter, f"sent {reason}")
                return []
            if push.stats is not None and self._on_stats is not None:
                self._on_stats(push.stats, drafter.generation)
                pushes[i] = msgspec.structs.replace(push, stats=None)
        self._full_polls = self._full_polls + 1 if drafter.transport.at_bound else 0
        if self._full_polls > MAX_FULL_POLLS:
            self._lose(drafter, "sent more than the target can read")
            return []
        now = time.monotonic()
        owes = self._awaiting_reply or drafter.transport.mid_message
        if pushes or not owes or now - self._listened_at > HANG_S / 2:
            self._heard_at = now  # it answered, owes nothing, or the server itself paused and did not poll
            self._awaiting_reply = self._awaiting_reply and not pushes
        elif now - self._heard_at > HANG_S:
            self._lose(drafter, f"said nothing for {HANG_S:.0f} s")
        self._listened_at = now
        return pushes

    def _lose(self, drafter: Drafter, reason: str) -> None:
        """Give up a drafter and have the supervisor start another."""
        if drafter is self._drafter:
            self.connected = False
            drafter.transport.close()
        if drafter.lost:
            return
        drafter.lost = True
        if self._resting:
            return
        self._logger.warning("SSD drafter lost (%s); decoding goes on without drafts until it is back", reason)
        self._wanted.set()

    # ---- the supervisor --------------------------------------------------------------------------------

    def _attend(self) -> None:
        """Notice that the process has ended, and poll in place of an idle target."""
        status = None if self._process is None else self._process.poll()
        with self._lock:
            youngest = self._newcomer or self._drafter
            if status is not None and youngest is not None:
                self._lose(youngest, f"it ended with status {status}")
            if time.monotonic() - self._polled_at <= WATCH_S:
                return
            self._take_up()
            drafter = self._drafter
            if drafter is not None and self._kept_bytes < MAX_IDLE_BYTES:
                before = drafter.transport.received_bytes
                self._kept += self._listen(0.0)
                self._kept_bytes += drafter.transport.received_bytes - before

    def _ends(self) -> bool:
        """Close the link if the server has ended, and return whether it is closed."""
        if self._server.has_ended():
            self.close()
        return self._closed.is_set()

    def _pause(self, seconds: float) -> bool:
        """Wait before a restart; returns whether the link is closed."""
        deadline = time.monotonic() + seconds
        while not self._ends() and (left := deadline - time.monotonic()) > 0:
            self._closed.wait(min(left, WATCH_S))
        return self._closed.is_set()

    def _backoff(self) -> tuple[float, float]:
        """First and longest pause before another attempt."""
        return BACKOFF_S

    def _goes_on(self, failure: DrafterFailed | None) -> bool:
        """Handle the result of a start and return whether to go on supervising.

        A failure before the first success is final.
        """
        if failure is not None and not self._num_started:
            self._failure = failure
        elif failure is not None and not self._resting:
            self._logger.warning("%s; trying again", failure)
            self._wanted.set()
        self._settled.set()
        if self._failure is not None:
            self._end()
        return self._failure is None

    def _do_without_trees(self) -> None:
        """Disable tree attention if the lost drafter crashed, since its kernels may be the cause."""
        process = self._process
        if process is None or not self._options.tree_attention:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CRASH_S)
        if process.returncode not in (None, 0, -signal.SIGKILL, -signal.SIGTERM):
            self._logger.warning("SSD: the drafter crashed; restarting it with vLLM's attention")
            self._options = msgspec.structs.replace(self._options, tree_attention=False)

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _launch(self) -> tuple[ProcessTransport, Welcome, str]:
        """Start a drafter and shake hands; raises `DrafterFailed`. The returned text identifies it in logs."""
        self._kill()
        transport, child_socket = socket_pair(max_push_bytes(self._options))
        if missing := run_on(self._options.cpus):
            raise DrafterFailed(f"drafter_cpus: the SSD drafter may not run on CPU {', '.join(map(str, missing))}")
        with child_socket:
            process = self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    DRAFTER_MODULE,
                    str(child_socket.fileno()),
                    msgspec.json.encode(self._options).decode(),
                ],
                pass_fds=[child_socket.fileno()],
                env=drafter_environment(os.environ, self._environment),
                stdin=subprocess.DEVNULL,
            )
        try:
            return transport, self._shake_hands(transport), f"pid {process.pid}"
        except BaseException:
            transport.close()
            raise

    def _start(self) -> None:
        """Launch a drafter and hand it over to the target's thread; raises `DrafterFailed`."""
        transport, welcome, name = self._launch()
        self._num_started += 1
        self._kv_bytes = welcome.kv_bytes
        with self._lock:
            if self._resting:
                transport.close()
                raise DrafterFailed("the SSD drafter was put to rest while it started")
            if self._newcomer is not None:
                self._newcomer.transport.close()
            self._newcomer = Drafter(transport, self._num_started, welcome.max_model_len)
            if time.monotonic() - self._polled_at > WATCH_S:
                self._take_up()
        self._logger.info(
            "SSD drafter %d ready: %s, %d KV pages of %d tokens, at most %d tokens per request; "
            "%.2f GiB weights + %.2f GiB KV pages + up to %.2f GiB logits",
            self._num_started,
            name,
            welcome.num_pages,
            welcome.page_size,
            welcome.max_model_len,
            welcome.weight_bytes / GIB,
            welcome.kv_bytes / GIB,
            welcome.logit_bytes / GIB,
        )
        if welcome.notice:
            self._logger.info("SSD: %s", welcome.notice)

    def _how_it_ended(self, error: TransportClosed) -> str:
        """Describe the end of a drafter that was not ready yet."""
        assert self._process is not None
        try:
            return f"ended with status {self._process.wait(EXIT_S)}"
        except subprocess.TimeoutExpired:
            return f"was lost ({error})"

    def _shake_hands(self, transport: ProcessTransport) -> Welcome:
        return shake_hands(
            transport,
            self._hello,
            self._startup_timeout_s,
            goes_on=lambda: not self._ends() and not self._resting,
            how_it_ended=self._how_it_ended,
        )


def _supervise(reference: weakref.ref[DrafterProcess]) -> None:
    """Body of the supervisor thread: start drafters until the link is gone or `_goes_on` returns False."""
    pause_s, lived_since, first = 0.0, math.inf, True
    while (link := reference()) is not None:
        wanted, closed = link._wanted, link._closed
        del link
        if not wanted.wait(timeout=WATCH_S):
            link = reference()
            if link is not None:
                if link._ends():
                    return
                link._attend()
            continue
        link = reference()
        if link is None or closed.is_set():
            return
        wanted.clear()
        shortest_s, longest_s = link._backoff()
        if not first:
            lived = time.monotonic() - lived_since > longest_s
            if lived_since < math.inf:
                link._do_without_trees()
            pause_s, lived_since = shortest_s if lived else min(2 * (pause_s or shortest_s), longest_s), math.inf
            link._kill()
            if link._pause(pause_s):
                return
            wanted.clear()  # requests made during the pause are served by this start
            if link._resting:
                continue
        first, failure = False, None
        try:
            link._start()
            lived_since = time.monotonic()
        except Exception as error:  # if this thread died, the target would be without a drafter and not know why
            link._kill()
            failure = error if isinstance(error, DrafterFailed) else DrafterFailed(f"the SSD drafter: {error}")
        if closed.is_set():
            link.close()
        if not link._goes_on(failure):
            return


def _close_weakly(reference: weakref.ref[DrafterProcess]) -> None:
    link = reference()
    if link is not None:
        link.close()
