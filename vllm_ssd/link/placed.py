"""A fleet of drafters that an agent process finds.

Only the agent talks to Ray. It may hang or die with Ray; the drafters that it has named stay in use. Whether a drafter
is alive is decided by its link; the agent only says where drafters are.
"""

from __future__ import annotations

import logging
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import msgspec

from vllm_ssd.link.credential import tls_context_of
from vllm_ssd.link.fleet import READY_S, Fleet
from vllm_ssd.link.handshake import DrafterFailed
from vllm_ssd.link.lifetime import Ancestor
from vllm_ssd.link.process import BACKOFF_S
from vllm_ssd.link.roster import Listed, Roster, Wanted
from vllm_ssd.link.seat import Seat

AGENT_COMMAND = [sys.executable, "-m", "vllm_ssd.pool"]
"""Command of the agent; further arguments are its socket's descriptor and a `Wanted` as JSON."""
MAX_DRAFTERS = 64
MAX_ROSTER_BYTES = 1 << 20
LOG_INTERVAL_S = 60.0
QUIET_S = 10.0
"""Time after the start before a roster's problem is logged for the first time."""


class PlacedFleet(Fleet):
    """A fleet whose drafters come and go: each one that the agent names gets a new link, or a vacant one.

    wanted: the drafters that the agent should find
    connect: creates the link with the given index, address and TLS context
    min_ready: number of drafters that a server waits for at startup
    on_join: called with all links when a link is added
    """

    def __init__(
        self,
        wanted: Wanted,
        connect: Callable[[int, str, ssl.SSLContext], Seat],
        *,
        min_ready: int,
        startup_timeout_s: float,
        logger: logging.Logger,
        on_join: Callable[..., None] = lambda *links: None,
    ) -> None:
        super().__init__([], min_ready)
        self._wanted = wanted
        self._connect = connect
        self._logger = logger
        self._on_join = on_join
        self._startup_timeout_s = startup_timeout_s
        self._start_by = time.monotonic() + startup_timeout_s
        self._seats: dict[str, int] = {}  # indices of links by the names of drafters
        self._credential = ""
        self._context: ssl.SSLContext | None = None
        self._roster = Roster()
        self._logged_at = time.monotonic() - LOG_INTERVAL_S + QUIET_S
        self._agent = Agent(wanted, weakref.WeakMethod(self.follow), logger)
        self._end = weakref.finalize(self, self._agent.close)

    def follow(self, roster: Roster) -> None:
        """Seat the drafters of a roster and vacate the seats of all others; raises ValueError for invalid entries."""
        self._roster = roster
        if roster.problem and time.monotonic() - self._logged_at > LOG_INTERVAL_S:
            self._logged_at = time.monotonic()
            self._logger.warning("SSD: %s", roster.problem)
        if roster.drafters is None:
            return
        if roster.drafters and (self._context is None or roster.credential != self._credential):
            self._context = tls_context_of(roster.credential.encode(), is_server=False)
            self._credential = roster.credential
            for index in range(len(self.links)):
                self._seat(index).trust(self._context)
        named = {listed.name: listed for listed in roster.drafters[:MAX_DRAFTERS]}
        for name in self._seats.keys() - named.keys():
            self._seat(self._seats.pop(name)).move(None)
        for listed in named.values():
            self._place(listed)

    def _place(self, listed: Listed) -> None:
        index = self._seats.get(listed.name)
        if index is None:
            taken = set(self._seats.values())
            index = next(i for i in range(len(taken) + 1) if i not in taken)
        if index == len(self.links):
            assert self._context is not None  # a roster with drafters has brought one
            self.links.append(self._connect(index, listed.address, self._context))
            self._on_join(*self.links)
        self._seat(index).move(listed.address, listed.leaving)
        self._seats[listed.name] = index

    def _seat(self, index: int) -> Seat:
        link = self.links[index]
        assert isinstance(link, Seat)
        return link

    def wait_until_ready(self) -> None:
        """Block until `min_ready` drafters have shaken hands; raises `DrafterFailed` if they do not in time."""
        while sum(link.connected for link in self.links) < self._min_ready:
            refusals = [link.refusal for link in self.links if isinstance(link, Seat) and link.refusal]
            if self._roster.fatal:
                raise DrafterFailed(f"ssd: {self._roster.problem}")
            if refusals and not self._wanted.pool:  # all own drafters are alike: the others would refuse too
                raise refusals[0]
            if time.monotonic() > self._start_by:
                reason = str(refusals[0]) if refusals else self._roster.problem or "Ray has not answered"
                raise DrafterFailed(f"ssd: {reason} (startup_timeout_s={self._startup_timeout_s:g})")
            time.sleep(READY_S)

    def close(self) -> None:
        """End the agent and close all links; idempotent."""
        self._end()
        super().close()


class Agent:
    """Keeps an agent process running and passes on its rosters.

    follow: returns the function to call with each roster, on the agent's thread; if that function raises, the process
    is restarted
    """

    def __init__(self, wanted: Wanted, follow: Callable[[], Callable[[Roster], None] | None], logger: logging.Logger):
        self._wanted = wanted
        self._follow = follow
        self._logger = logger
        self._server = Ancestor(wanted.server_pid)
        self._closed = threading.Event()
        self._process: subprocess.Popen | None = None
        # PR_SET_PDEATHSIG follows the *thread* that started the child, so one long-lived thread starts them all.
        self._thread = threading.Thread(target=self._run, name="ssd-agent", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the process; idempotent."""
        self._closed.set()
        if self._process is not None:
            self._process.kill()

    def _run(self) -> None:
        pause_s = BACKOFF_S[0]
        while not self._closed.is_set() and not self._server.has_ended():
            started = time.monotonic()
            try:
                reason = self._listen()
            except Exception as error:  # if this thread died, the target would never learn of other drafters
                reason = f"{type(error).__name__}: {error}"
            if self._closed.is_set():
                return
            pause_s = BACKOFF_S[0] if time.monotonic() - started > BACKOFF_S[1] else min(2 * pause_s, BACKOFF_S[1])
            self._logger.info("SSD: the Ray agent has ended (%s); restarting it in %g s", reason, pause_s)
            self._closed.wait(pause_s)

    def _listen(self) -> str:
        """Run the process once and follow its rosters; returns how it ended."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            arguments = [str(theirs.fileno()), msgspec.json.encode(self._wanted).decode()]
            self._process = subprocess.Popen(
                [*AGENT_COMMAND, *arguments], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
            theirs.close()
            try:
                with ours.makefile("rb") as lines:
                    while not self._closed.is_set() and (line := lines.readline(MAX_ROSTER_BYTES)):
                        follow = self._follow()
                        if follow is None:
                            return "nobody listens"
                        follow(msgspec.json.decode(line, type=Roster))
                        del follow
            finally:
                self._process.kill()
                status = self._process.wait()
        return f"status {status}"
