"""Between the target's device and the drafter, on a thread of its own: outcomes one way, blocks the other.

Under asynchronous scheduling vLLM's thread is a step ahead of the device: outcomes are known to nobody when it asks
for drafts, so it only says where they will appear. Everything that takes time happens here.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_ssd.compat.target.runner import DrafterState
from vllm_ssd.config import SSDConfig
from vllm_ssd.kernels import OUTCOME_COLUMNS, Found
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import ALL_TOKENS, Push, SpeculationBlock, Truncation
from vllm_ssd.policy import NgramGain
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import DrafterClient, RemoteRequest
from vllm_ssd.target.v2.lookup_cache import SpeculationCache
from vllm_ssd.target.v2.verified import VerifiedDrafts

NUM_BUFFERS = 4
"""Buffers for outcomes made at the start: vLLM's thread is a step or two ahead of the device."""

NGRAM_LOSS = 0.1
"""Tokens that an n-gram draft costs in later hits, the drafter having more places to fork at (a guess)."""

HIT, LATE = int(Found.HIT), int(Found.LATE)
"""As plain numbers: every row is compared with them, and members of an enum are slow to look up."""

HEARTBEAT_S = 0.25
"""How often a drafter is looked at that says nothing, so that its death or hang is noticed."""


@dataclass(frozen=True, slots=True)
class OutcomeBuffer:
    """Where the device leaves the outcomes of one round: rows [S, 5 + K] int32 of `kernels.lookup` on the host.

    Beside a CUDA device they are pinned memory, which its kernels write to; `written` happens when they have.
    """

    rows: torch.Tensor
    written: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class Verification:
    """A round on the device; see `Courier.await_outcomes`."""

    step: int
    serials: list[int]
    num_scheduled: list[int]
    buffer: OutcomeBuffer


@dataclass(slots=True)
class SlotRequest:
    """A request as the courier's thread sees it, some steps behind vLLM's."""

    remote: RemoteRequest
    slot: int
    token_ids: list[int]  # committed
    verifying: list[int] = field(default_factory=list)  # drafts of the round after them
    by_ngram: bool = False  # `verifying` are what followed an earlier n-gram
    last_length: int = sys.maxsize  # most committed tokens that it will have


class Courier:
    """Carries what vLLM's thread and the device leave to the drafter, and its blocks into the cache.

    All methods down to `stop` may be called from any thread and return at once. A request is known by its serial
    number, which no other request ever had: one that vLLM preempts and resumes is a new one. A `step` is the number of
    a step of vLLM's scheduler, which has up to `num_batches` under way.
    """

    def __init__(
        self,
        config: SSDConfig,
        fleet: Fleet,
        metrics: Metrics,
        cache: SpeculationCache,
        logger: logging.Logger,
        num_batches: int,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._cache = cache
        self._logger = logger
        self._client = DrafterClient(config, fleet, metrics, self._keep_blocks)
        self._requests: dict[int, SlotRequest] = {}  # by serial number
        self._verified = VerifiedDrafts(metrics, num_batches)
        self._tasks: deque[Callable[[], None]] = deque()
        self._on_device: queue.SimpleQueue[Verification | None] = queue.SimpleQueue()
        # Pinned memory must outlive the kernels that write to it: no buffer is ever given back to PyTorch.
        self._made: list[OutcomeBuffer] = []
        self._buffers = deque(self._new_buffer() for _ in range(NUM_BUFFERS))
        self._num_drafts = config.num_speculative_tokens  # of a round
        self._ngram_gain = NgramGain(config.num_speculative_tokens)
        self.wants_ngram = config.on_miss in ("ngram", "auto")
        """Whether rows without drafts should have n-gram drafts instead; vLLM's thread reads it."""
        self.drafter_state = DrafterState.IN_TIME
        """What the next round will be worth as a sample; vLLM's thread reads it."""
        self._untold: set[int] = set()  # serial numbers of requests that are to be told of several rounds at once
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopped = False

    def run(self) -> None:
        """Start the threads; they end with `stop`."""
        for name, body in (("ssd-courier", self._carry), ("ssd-outcomes", self._await_device)):
            threading.Thread(target=self._run, args=(body,), name=name, daemon=True).start()

    # ---- what vLLM's thread tells ----------------------------------------------------------------------

    def start(
        self,
        serial: int,
        slot: int,
        token_ids: Sequence[int],
        temperature: float,
        truncation: Truncation = ALL_TOKENS,
        cache_salt: bytes = b"",
    ) -> None:
        """Request `serial` joins in `slot` with all its tokens so far."""
        # A copy: vLLM passes the scheduler's own list, which grows before the courier's thread has its turn.
        told = temperature, truncation, cache_salt
        self._enqueue(functools.partial(self._start, serial, slot, list(token_ids), *told))

    def finish(self, step: int, serials: Sequence[int]) -> None:
        """All requests whose end came with `step`, before anything else of that step."""
        self._enqueue(functools.partial(self._finish, step, serials))

    def preempt(self, step: int, serial: int) -> None:
        """Request `serial` has left its slot with `step`, but has not ended."""
        self._enqueue(functools.partial(self._preempt, step, serial))

    def end_at(self, serial: int, length: int) -> None:
        """Request `serial` ends at so many committed tokens, if not before."""
        self._enqueue(functools.partial(self._end_at, serial, length))

    def want(self, num_drafts: int) -> None:
        """Rounds carry `num_drafts` drafts from now on; with 0 the drafter is left in peace."""
        self._enqueue(functools.partial(self._want, num_drafts))

    def outcome_buffer(self) -> OutcomeBuffer:
        """A buffer for `await_outcomes`, used again once its rows were read; one more when all are under way."""
        try:
            return self._buffers.popleft()
        except IndexError:
            return self._new_buffer()

    def await_outcomes(self, step: int, serials: list[int], num_scheduled: list[int], buffer: OutcomeBuffer) -> None:
        """The round of `step`, whose outcomes the current stream writes to the first rows of `buffer`.

        serials, num_scheduled: each row's request, and the drafts that vLLM counts in it, filler included.
        """
        round_ = Verification(step, serials, num_scheduled, buffer)
        if self._stopped:
            self._buffers.append(buffer)
        elif buffer.written is None:
            self._enqueue(functools.partial(self._take_outcomes, round_))
        else:
            buffer.written.record()
            self._on_device.put(round_)

    def stop(self) -> None:
        """End the threads and the drafter."""
        self._stopped = True
        self._on_device.put(None)
        os.eventfd_write(self._wakeup, 1)

    def _enqueue(self, task: Callable[[], None]) -> None:
        """Leave work to the courier's thread, if it still runs."""
        if not self._stopped:
            self._tasks.append(task)
            os.eventfd_write(self._wakeup, 1)

    def _new_buffer(self) -> OutcomeBuffer:
        num_slots, _, _, num_drafts = self._cache.blocks.draft_token_ids.shape
        on_cuda = self._cache.device.type == "cuda"
        rows = torch.zeros(num_slots, OUTCOME_COLUMNS + num_drafts, dtype=torch.int32, pin_memory=on_cuda)
        buffer = OutcomeBuffer(rows, torch.cuda.Event(blocking=True) if on_cuda else None)
        self._made.append(buffer)
        return buffer

    # ---- the threads -----------------------------------------------------------------------------------

    def _run(self, body: Callable[[], None]) -> None:
        """One of the two threads: when it ends or fails, both end, and the target decodes on without drafts."""
        try:
            if self._cache.device.type == "cuda":
                # A thread starts on device 0, and leaving a stream of another would make a context there.
                torch.cuda.set_device(self._cache.device)
            body()
        except Exception:
            self._logger.exception("SSD: a thread between target and drafter failed; decoding goes on without drafts")
        finally:
            self.stop()

    def _await_device(self) -> None:
        """Waiting for the device and waiting for the drafter take two threads."""
        while (round_ := self._on_device.get()) is not None:
            written = round_.buffer.written
            assert written is not None  # see `await_outcomes`
            written.synchronize()
            self._enqueue(functools.partial(self._take_outcomes, round_))

    def _carry(self) -> None:
        try:
            while not self._stopped:
                self._fleet.wait(self._wakeup, HEARTBEAT_S)
                self.work()
        finally:
            self._stopped = True
            self._fleet.close()
            self._tasks.clear()

    def work(self) -> None:
        """Bring the blocks that have arrived to the device, then tell the drafter all that was left to tell."""
        try:
            os.eventfd_read(self._wakeup)
        except BlockingIOError:  # it was a push that woke the thread
            pass
        self._client.poll()
        self._cache.flush()
        while self._tasks:
            self._tasks.popleft()()
        self._client.send(self._num_drafts)
        self.drafter_state = self._drafter_state()
        self._metrics.log()

    def _drafter_state(self) -> DrafterState:
        if not self._client.connected and not self.wants_ngram:
            return DrafterState.AWAY
        return DrafterState.BEHIND if self._untold or not self._client.in_time else DrafterState.IN_TIME

    def _keep_blocks(self, push: Push, blocks: list[SpeculationBlock], firsts: list[int]) -> None:
        requests, serials = self._requests, [int(block.request_id) for block in blocks]
        self._cache.put(push, [requests[serial].slot for serial in serials], serials, blocks, firsts)

    def _start(
        self,
        serial: int,
        slot: int,
        token_ids: list[int],
        temperature: float,
        truncation: Truncation,
        cache_salt: bytes,
    ) -> None:
        remote = self._client.add(str(serial), temperature, truncation, cache_salt)
        self._requests[serial] = SlotRequest(remote, slot, token_ids)
        if self._num_drafts:
            self._client.open(remote, token_ids)

    def _finish(self, step: int, serials: Sequence[int]) -> None:
        self._verified.end(step, serials)
        for serial in serials:
            self._close(serial)

    def _preempt(self, step: int, serial: int) -> None:
        self._verified.preempt(step, serial)
        self._close(serial)

    def _close(self, serial: int) -> None:
        self._untold.discard(serial)
        self._requests.pop(serial, None)
        self._client.close(str(serial))

    def _end_at(self, serial: int, length: int) -> None:
        if serial in self._requests:
            self._requests[serial].last_length = length

    def _want(self, num_drafts: int) -> None:
        if num_drafts and not self._num_drafts:
            self._untold = set(self._requests)
        self._num_drafts = num_drafts

    def _take_outcomes(self, round_: Verification) -> None:
        """Commit what the rows of a round emitted, and queue it for the drafter."""
        self._client.begin_round()
        any_missed = False
        rows = round_.buffer.rows[: len(round_.serials)].tolist()
        self._buffers.append(round_.buffer)
        self._verified.take(round_.step, round_.serials, round_.num_scheduled, rows)
        requests = self._requests
        for serial, (num_emitted, last, found, _, num_drafts, *drafts) in zip(round_.serials, rows):
            request = requests.get(serial)
            if request is None or not num_emitted:  # it has left since, or its prompt is not through
                continue
            if request.by_ngram:
                self._ngram_gain.observe(len(request.verifying), num_emitted - 1)
            is_hit = found == HIT
            any_missed = any_missed or not is_hit
            request.by_ngram = num_drafts > 0 and not is_hit
            request.token_ids += [*request.verifying[: num_emitted - 1], last]
            request.verifying = drafts[:num_drafts]
            if self._num_drafts:
                self._tell(serial, request, found)
        if any_missed and self._config.on_miss == "auto":
            self.wants_ngram = self._ngram_gain.drafts(self._config.num_speculative_tokens, NGRAM_LOSS)[0] > 0

    def _tell(self, serial: int, request: SlotRequest, found: int) -> None:
        client, remote, token_ids = self._client, request.remote, request.token_ids
        if self._untold:
            self._untold.discard(serial)
        if len(token_ids) + 2 > request.last_length:  # its next round only emits
            client.close(remote.request_id)
        elif client.holds(remote):
            client.looked_up(remote, hit=found == HIT, block=found != LATE)
            client.outcome(remote, token_ids[remote.length :], request.verifying)
        else:
            client.open(remote, token_ids, request.verifying)
