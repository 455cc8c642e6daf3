"""Start the drafter's process, watch it, and start it again when it dies.

Two threads meet here. The *supervisor*, a thread of each `DrafterProcess`, starts processes, watches and ends them; the
*target's thread* calls `send` and `poll`. The supervisor leaves a drafter that has shaken hands in `_newcomer`, and the
target's thread takes it up in `poll`: between two polls `generation` does not change, so the events of one step all
reach the drafter that they were written for. Only while the target is idle and nobody polls does the supervisor take
up and listen in its place, so that a drafter is replaced and its statistics are read without a request. One lock guards
what both touch; the supervisor holds it for no longer than one bounded poll.
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
import psutil

from vllm_ssd.link.checks import PushChecker, max_push_bytes
from vllm_ssd.link.environment import drafter_environment
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.placement import NO_UTILIZATION, run_on
from vllm_ssd.link.protocol import DrafterStats, Hello, Push, Refused, Step, Welcome
from vllm_ssd.link.transport import ProcessTransport, TransportClosed, socket_pair

DRAFTER_MODULE = "vllm_ssd.drafter"
"""What `python -m` runs as the drafter, with the number of its socket and its options as arguments."""
HANG_S = 10.0
"""A drafter that owes an answer and gives none for so long, while it is listened to, is taken for hung."""
SUSPECT_S = 2.0
"""So long silent, its requests go to another drafter, if there is one: sound ones say something every second."""
CRASH_S = 2.0
"""A drafter that crashed has this long to end, until it is taken for hung."""
EXIT_S = 10.0
"""A drafter whose socket has closed has this long to end by itself."""
BACKOFF_S = (1.0, 60.0)
"""First and longest pause before a drafter is started again; doubled with each failure."""
WATCH_S = 0.5
"""How often the supervisor looks at the processes of drafter and server; a target that polls less often is idle."""
MAX_FULL_POLLS = 16
"""A drafter that fills the bound of so many polls in a row is flooding the target."""
GIB = 1 << 30
MAX_IDLE_BYTES = 16 << 20
"""Bytes that are read in an idle target's place and kept for its next poll; the rest stays in the socket."""


class DrafterFailed(RuntimeError):
    """The drafter never came up; the message is the one sentence the user needs."""


@dataclass(slots=True, eq=False)
class Drafter:
    """One drafter process that has shaken hands."""

    transport: ProcessTransport
    generation: int
    max_model_len: int
    lost: bool = False  # noticed and logged, by either thread


class DrafterProcess:
    """A link to one drafter process, which a thread of its own starts and restarts.

    `send` and `poll` never raise and never wait for a drafter that is gone: without one, steps are dropped and
    nothing is heard. What a drafter pushes is checked by value; one that sends nonsense is replaced. `generation` grows
    when a new drafter has shaken hands.

    on_stats: gets a drafter's statistics, which `poll` then leaves out, and its generation
    on_end: called once, when the link is closed, the server has ended or nobody holds the link any more
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
        # vLLM 0.32 leaves its workers behind when the server is killed; the drafter must not stay with them.
        self._server = next((p for p in psutil.Process().parents() if p.pid == server_pid), None)
        self._process: subprocess.Popen | None = None  # the supervisor's
        self._num_started = 0  # the supervisor's: drafters that have shaken hands
        self._kv_bytes = 0  # of the drafter started last
        self._resting = False  # the target's: no drafter is wanted
        self._lock = threading.RLock()
        self._newcomer: Drafter | None = None
        self._drafter: Drafter | None = None
        self._kept: list[Push] = []  # read while the target was idle
        self._kept_bytes = 0
        self._awaiting_reply = False
        self._listened_at = self._heard_at = 0.0
        self._polled_at = -math.inf  # by the target itself
        self._full_polls = 0
        self._failure: DrafterFailed | None = None
        self._wanted = threading.Event()  # set while a (new) drafter should be started
        self._settled = threading.Event()  # set once the first start has succeeded or failed
        self._closed = threading.Event()
        self._wanted.set()
        self._end = weakref.finalize(self, on_end or (lambda: None))
        # The child asks the kernel to die with the *thread* that started it, so one thread starts them all.
        self._thread = threading.Thread(target=_supervise, args=(weakref.ref(self),), name="ssd-drafter", daemon=True)
        self._thread.start()
        atexit.register(_close_weakly, weakref.ref(self))

    # ---- the target's thread ---------------------------------------------------------------------------

    def wait_until_ready(self) -> None:
        """Block until the first drafter has shaken hands; raises `DrafterFailed` when it does not."""
        self._settled.wait()
        if self._failure is not None:
            raise self._failure

    def send(self, step: Step) -> None:
        """Tell the drafter of one target step; dropped while there is no drafter."""
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
        """What the drafter has pushed since the last call, waiting at most `timeout_s` when there is nothing."""
        with self._lock:
            self._take_up()
            kept, self._kept, self._kept_bytes = self._kept, [], 0
            pushes = self._listen(0.0 if kept else timeout_s)
            self._polled_at = time.monotonic()
            return kept + pushes if self.connected else []

    @property
    def suspect(self) -> bool:
        """Whether the drafter was told something, was listened to since, and has said nothing for SUSPECT_S."""
        return self.connected and self._awaiting_reply and self._listened_at - self._heard_at > SUSPECT_S

    def descriptor(self) -> int | None:
        """A file descriptor that is readable when `poll` has news, or None when it has some already; -1 for none."""
        drafter = self._drafter
        if not self.connected or drafter is None:
            return -1
        return None if self._kept or drafter.transport.at_bound else drafter.transport.fileno()

    def rest(self) -> None:
        """End the drafter, whose memory is wanted elsewhere, and start no other until `wake`."""
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
        """Start a drafter again after `rest`; decoding goes on without drafts until it is ready."""
        if self._resting:
            self._resting = False
            self._wanted.set()

    def keep_size(self) -> None:
        """Give later drafters as much KV memory as the first one found: by then, what is free is not theirs alone."""
        engine_args = self._options.engine_args | {
            "kv_cache_memory_bytes": self._kv_bytes,
            "gpu_memory_utilization": NO_UTILIZATION,
        }
        self._options = msgspec.structs.replace(self._options, engine_args=engine_args)

    def close(self) -> None:
        """End the drafter; idempotent, and called at exit."""
        self._closed.set()
        self._wanted.set()
        self.connected = False
        self._kill()  # first: whoever waits in `poll` holds the lock, and wakes when the drafter's end hangs up
        with self._lock:
            for drafter in (self._drafter, self._newcomer):
                if drafter is not None:
                    drafter.transport.close()
        self._end()

    # ---- under the lock --------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Turn to the drafter that has come up since, if any."""
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
        """What has arrived, if all of it is sound; a drafter that is gone, hangs or sends nonsense is lost."""
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
            self._heard_at = now  # heard it, asked nothing, or did not listen: a pause of the server's own
            self._awaiting_reply = self._awaiting_reply and not pushes
        elif now - self._heard_at > HANG_S:
            self._lose(drafter, f"said nothing for {HANG_S:.0f} s")
        self._listened_at = now
        return pushes

    def _lose(self, drafter: Drafter, reason: str) -> None:
        """Give a drafter up, and have the supervisor start another."""
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
        """Notice a process that has ended, and stand in for a target that is idle."""
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
        """Whether the link is closed, which it is from now on if the server has ended."""
        if self._is_orphan():
            self.close()
        return self._closed.is_set()

    def _pause(self, seconds: float) -> bool:
        """Wait before a restart; returns whether the link is closed."""
        deadline = time.monotonic() + seconds
        while not self._ends() and (left := deadline - time.monotonic()) > 0:
            self._closed.wait(min(left, WATCH_S))
        return self._closed.is_set()

    def _is_orphan(self) -> bool:
        """Whether the server that this worker belongs to has ended, or its process id is another's by now."""
        try:
            return self._server is not None and (
                not self._server.is_running() or self._server.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True

    def _do_without_trees(self) -> None:
        """Start no drafter with its own attention again if the one that was lost crashed, perhaps in it."""
        process = self._process
        if process is None or not self._options.tree_attention:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CRASH_S)
        if process.returncode not in (None, 0, -signal.SIGKILL, -signal.SIGTERM):
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
            welcome = self._shake_hands(process, transport)
        except BaseException:
            transport.close()
            raise
        self._num_started += 1
        self._kv_bytes = welcome.kv_bytes
        with self._lock:
            if self._resting:
                transport.close()
                raise DrafterFailed("the SSD drafter is to rest")
            if self._newcomer is not None:
                self._newcomer.transport.close()
            self._newcomer = Drafter(transport, self._num_started, welcome.max_model_len)
            if time.monotonic() - self._polled_at > WATCH_S:
                self._take_up()
        self._logger.info(
            "SSD drafter %d ready: pid %d, %d KV pages of %d tokens, at most %d tokens a request; "
            "%.2f GiB weights + %.2f GiB KV pages + up to %.2f GiB logits",
            self._num_started,
            process.pid,
            welcome.num_pages,
            welcome.page_size,
            welcome.max_model_len,
            welcome.weight_bytes / GIB,
            welcome.kv_bytes / GIB,
            welcome.logit_bytes / GIB,
        )
        if welcome.notice:
            self._logger.info("SSD: %s", welcome.notice)

    def _shake_hands(self, process: subprocess.Popen, transport: ProcessTransport) -> Welcome:
        deadline, answers = time.monotonic() + self._startup_timeout_s, []
        try:
            transport.send(self._hello)
            while not answers and time.monotonic() < deadline and not self._ends() and not self._resting:
                answers = transport.poll(min(WATCH_S, max(deadline - time.monotonic(), 0.0)))
        except TransportClosed as error:
            try:
                how = f"ended with status {process.wait(EXIT_S)}"
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
        if not isinstance(answers[0], Welcome) or len(answers) > 1:
            raise DrafterFailed("the SSD drafter answered the handshake with something else")
        return answers[0]


def _supervise(reference: weakref.ref[DrafterProcess]) -> None:
    """Start drafters for as long as the link lives; the first failure to start is final."""
    pause_s, lived_since = BACKOFF_S[0], math.inf
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
        first = link._num_started == 0
        if not first:
            lived = time.monotonic() - lived_since > BACKOFF_S[1]
            if lived_since < math.inf:
                link._do_without_trees()
            pause_s, lived_since = BACKOFF_S[0] if lived else min(2 * pause_s, BACKOFF_S[1]), math.inf
            link._kill()
            if link._pause(pause_s):
                return
            wanted.clear()  # whoever wanted one meanwhile wants this one
            if link._resting:
                continue
        try:
            link._start()
            lived_since = time.monotonic()
        except Exception as error:  # a thread that dies would leave the target without a drafter, unexplained
            link._kill()
            failure = error if isinstance(error, DrafterFailed) else DrafterFailed(f"the SSD drafter: {error}")
            if first:
                link._failure = failure
            elif not link._resting:
                link._logger.warning("%s; trying again", failure)
                wanted.set()
        if closed.is_set():
            link.close()
        link._settled.set()
        if link._failure is not None:
            link._end()
            return


def _close_weakly(reference: weakref.ref[DrafterProcess]) -> None:
    link = reference()
    if link is not None:
        link.close()
