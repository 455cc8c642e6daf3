"""Between the target's device and the drafter, on a thread of its own: outcomes one way, blocks the other.

Under asynchronous scheduling vLLM's thread is a step ahead of the device: outcomes are known to nobody when it asks
for drafts, so it only says where they will appear. Everything that takes time happens here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vllm_ssd.config import SSDConfig
from vllm_ssd.kernels import OUTCOME_COLUMNS, Found
from vllm_ssd.link.protocol import Close, Open, Outcome, SpeculationBlock
from vllm_ssd.policy import NgramGain
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import Link, Session, Sessions
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

Event = Open | Outcome | Close

NUM_BUFFERS = 4
"""Buffers for outcomes made at the start: vLLM's thread is a step or two ahead of the device."""

NGRAM_LOSS = 0.1
"""Tokens that an n-gram draft costs in later hits, the drafter having more places to fork at (a guess)."""

HEARTBEAT_S = 0.25
"""How often a drafter is looked at that says nothing, so that its death or hang is noticed."""


class WaitableLink(Link, Protocol):
    """A link that a thread can sleep on."""

    def wait(self, wakeup: int, timeout_s: float) -> None:
        """Return when the drafter has said something, the descriptor `wakeup` is readable, or the time is over."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class OutcomeBuffer:
    """Where the device leaves the outcomes of one round: rows [S, 5 + K] int32 of `kernels.lookup` on the host.

    Beside a CUDA device they are pinned memory, which its kernels write to; `written` happens when they have.
    """

    rows: torch.Tensor
    written: torch.cuda.Event | None


@dataclass(slots=True)
class RemoteSession(Session):
    """A request as this thread sees it, some steps behind vLLM's."""

    slot: int = 0
    token_ids: list[int] = field(default_factory=list)  # committed
    verifying: list[int] = field(default_factory=list)  # drafts of the round after them


class Courier(Sessions[RemoteSession]):
    """Carries what vLLM's thread and the device leave to the drafter, and its blocks into the cache.

    `start`, `finish`, `decided` and `stop` may be called from any thread and return at once. A request is known by its
    serial number, which no other request ever had: one that vLLM preempts and resumes is a new one.
    """

    def __init__(
        self, config: SSDConfig, link: WaitableLink, metrics: Metrics, cache: SpeculationCache, logger: logging.Logger
    ) -> None:
        super().__init__(config, link, metrics)
        self._link: WaitableLink = link
        self._cache = cache
        self._logger = logger
        self._tasks: deque[Callable[[], list[Event]]] = deque()
        self._undecided: queue.SimpleQueue[tuple[list[int], OutcomeBuffer] | None] = queue.SimpleQueue()
        self._buffers = deque(self._new_buffer() for _ in range(NUM_BUFFERS))
        self._wanted = config.num_speculative_tokens
        self._ngram_gain = NgramGain(config.num_speculative_tokens)
        self.wants_ngram = config.on_miss in ("ngram", "auto")
        """Whether rows without drafts should have n-gram drafts instead; vLLM's thread reads it."""
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopped = False

    def run(self) -> None:
        """Start the threads; they end with `stop`."""
        threading.Thread(target=self._carry, name="ssd-courier", daemon=True).start()
        threading.Thread(target=self._await_decisions, name="ssd-outcomes", daemon=True).start()

    # ---- what vLLM's thread tells ----------------------------------------------------------------------

    def start(self, serial: int, slot: int, token_ids: Sequence[int], temperature: float) -> None:
        """Request `serial` joins in `slot` with all its tokens so far."""
        self._leave(functools.partial(self._start, serial, slot, token_ids, temperature))

    def finish(self, serial: int) -> None:
        """Request `serial` has left its slot."""
        self._leave(functools.partial(self._finish, serial))

    def want(self, num_drafts: int) -> None:
        """Rounds carry `num_drafts` drafts from now on; with 0 the drafter is left in peace."""
        self._leave(functools.partial(self._want, num_drafts))

    def outcome_buffer(self) -> OutcomeBuffer:
        """A buffer for `decided`, used again once its rows were read; one more when all are under way."""
        try:
            return self._buffers.popleft()
        except IndexError:
            return self._new_buffer()

    def decided(self, serials: list[int], outcomes: OutcomeBuffer) -> None:
        """A round of requests `serials`, whose outcomes the current stream writes to the first rows of a buffer."""
        if self._stopped:
            self._buffers.append(outcomes)
        elif outcomes.written is None:
            self._leave(functools.partial(self._decide, serials, outcomes))
        else:
            outcomes.written.record()
            self._undecided.put((serials, outcomes))

    def stop(self) -> None:
        """End the threads and the drafter."""
        self._stopped = True
        self._undecided.put(None)
        self._leave(list)

    def _leave(self, task: Callable[[], list[Event]]) -> None:
        self._tasks.append(task)
        os.eventfd_write(self._wakeup, 1)

    def _new_buffer(self) -> OutcomeBuffer:
        num_slots, _, _, num_drafts = self._cache.blocks.draft_token_ids.shape
        on_cuda = self._cache.device.type == "cuda"
        rows = torch.zeros(num_slots, OUTCOME_COLUMNS + num_drafts, dtype=torch.int32, pin_memory=on_cuda)
        return OutcomeBuffer(rows, torch.cuda.Event(blocking=True) if on_cuda else None)

    # ---- the threads -----------------------------------------------------------------------------------

    def _await_decisions(self) -> None:
        """Waiting for the device and waiting for the drafter take two threads."""
        while (item := self._undecided.get()) is not None:
            serials, outcomes = item
            outcomes.written.synchronize()
            self._leave(functools.partial(self._decide, serials, outcomes))

    def _carry(self) -> None:
        try:
            while not self._stopped:
                self._link.wait(self._wakeup, HEARTBEAT_S)
                self.work()
        except Exception:  # the target must not end with its helper
            self._logger.exception("SSD: the thread between target and drafter failed; decoding goes on without drafts")
        finally:
            self._stopped = True
            self._link.close()

    def work(self) -> None:
        """Bring the blocks that have arrived to the device, then tell the drafter all that was left to tell."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        self._absorb(self._link.poll())
        self._cache.flush()
        events: list[Event] = []
        while self._tasks:
            events += self._tasks.popleft()()
        if events:
            self._send(events, self._wanted)
        self._metrics.log()

    def _start(self, serial: int, slot: int, token_ids: Sequence[int], temperature: float) -> list[Event]:
        session = RemoteSession(str(serial), temperature, len(token_ids), slot=slot, token_ids=list(token_ids))
        self._sessions[session.request_id] = session
        return [*self._open(session, token_ids)] if self._wanted else []

    def _finish(self, serial: int) -> list[Event]:
        session = self._sessions.pop(str(serial))
        return [Close(session.request_id)] if session.generation == self._link.generation else []

    def _want(self, num_drafts: int) -> list[Event]:
        self._wanted = num_drafts
        return []

    def _decide(self, serials: list[int], outcomes: OutcomeBuffer) -> list[Event]:
        self._round += 1
        events: list[Event] = []
        offered, accepted, missed = [], [], False
        rows = outcomes.rows[: len(serials)].tolist()
        self._buffers.append(outcomes)
        for serial, (num_emitted, last, found, _, num_drafts, *drafts) in zip(serials, rows):
            session = self._sessions.get(str(serial))
            if session is None or not num_emitted:  # it has left since, or its prompt is not through
                continue
            emitted = [*session.verifying[: num_emitted - 1], last]
            offered.append(len(session.verifying))
            accepted.append(num_emitted - 1)
            if session.by_ngram:
                self._ngram_gain.observe(len(session.verifying), num_emitted - 1)
            missed = missed or found != Found.HIT
            session.by_ngram = num_drafts > 0 and found != Found.HIT
            session.token_ids += emitted
            session.verifying = drafts[:num_drafts]
            if not self._wanted:
                continue
            if session.generation != self._link.generation:
                opened = self._reopen(session, session.token_ids)
                events += opened
                if not opened or not session.verifying:
                    continue
            else:
                self._metrics.outcome(hit=found == Found.HIT, block=found != Found.LATE)
            unheard, session.length = session.token_ids[session.length :], len(session.token_ids)
            events.append(Outcome(session.request_id, session.epoch, session.length, unheard, session.verifying))
        self._metrics.accepted(offered, accepted)
        if missed and self._config.on_miss == "auto":
            self.wants_ngram = self._ngram_gain.drafts(self._config.num_speculative_tokens, NGRAM_LOSS)[0] > 0
        return events

    def _take(self, session: RemoteSession, block: SpeculationBlock) -> bool:
        if not session.expects(block):
            return False
        self._cache.put(session.slot, int(session.request_id), block)
        return True
