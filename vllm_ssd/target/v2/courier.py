"""Carries outcomes from the target's device to the drafter, and blocks back, on its own threads.

Under asynchronous scheduling vLLM's thread runs a step ahead of the device. When it asks for drafts, outcomes are not
known on the host yet, so it only passes on the buffer in which they will appear. All work that takes time happens here.
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
from vllm_ssd.link.protocol import ALL_TOKENS, NO_NOISE, Noise, Push, SpeculationBlock, Truncation
from vllm_ssd.policy import NgramGain
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.requests import DrafterClient, RemoteRequest
from vllm_ssd.target.v2.lookup_cache import SpeculationCache
from vllm_ssd.target.v2.verified import VerifiedDrafts

NUM_BUFFERS = 4
"""Initial number of outcome buffers; vLLM's thread is a step or two ahead of the device."""

NGRAM_LOSS = 0.1
"""Guessed cost of an n-gram draft in later hits, in tokens: with more fork points each gets fewer branches."""

HIT, LATE = int(Found.HIT), int(Found.LATE)
"""Plain integers, because looking up enum members for every row is slow."""

HEARTBEAT_S = 0.25
"""Longest wait between two polls of the drafters, so that a dead or hung one is noticed."""


@dataclass(frozen=True, slots=True)
class OutcomeBuffer:
    """Host buffer for the outcomes of one round.

    rows [S, 6 + K] int32: written by `kernels.lookup`, in pinned memory with a CUDA device; written: event that is
    recorded after that, None without one
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
    """The courier thread's view of a request, which is some steps behind vLLM's."""

    remote: RemoteRequest
    slot: int
    token_ids: list[int]  # committed
    verifying: list[int] = field(default_factory=list)  # drafts under verification
    num_drafted: int = 0  # drafts of `verifying` before the n-gram drafts
    last_length: int = sys.maxsize  # committed tokens at which it ends, if not earlier


class Courier:
    """Passes events from vLLM's thread and outcomes from the device to the drafter, and its blocks to the cache.

    All methods down to `stop` may be called from any thread and return at once. Requests are identified by serial
    numbers, which are never reused: a request that vLLM preempts and resumes gets a new one. step: number of a
    scheduler step of vLLM; num_batches: scheduler steps in flight at most
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
        # Pinned memory must outlive the kernels that write to it, so buffers are never freed.
        self._made: list[OutcomeBuffer] = []
        self._buffers = deque(self._new_buffer() for _ in range(NUM_BUFFERS))
        self._num_drafts = config.num_speculative_tokens  # wanted per round
        self._ngram_gain = NgramGain(config.num_speculative_tokens)
        self.wants_ngram = config.on_miss in ("ngram", "auto")
        """Whether rows with fewer drafts than wanted should get n-gram drafts; read by vLLM's thread."""
        self.drafter_state = DrafterState.IN_TIME
        """State of the drafters for the next round; read by vLLM's thread."""
        self._untold: set[int] = set()  # requests whose next event covers several rounds, by serial number
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopped = False

    def run(self) -> None:
        """Start the threads; they end with `stop`."""
        for name, body in (("ssd-courier", self._carry), ("ssd-outcomes", self._await_device)):
            threading.Thread(target=self._run, args=(body,), name=name, daemon=True).start()

    # ---- called by vLLM's thread -----------------------------------------------------------------------

    def start(
        self,
        serial: int,
        slot: int,
        token_ids: Sequence[int],
        temperature: float,
        truncation: Truncation = ALL_TOKENS,
        cache_salt: bytes = b"",
        noise: Noise = NO_NOISE,
    ) -> None:
        """Request `serial` joins in `slot`; token_ids: all its tokens so far."""
        # Copied, because vLLM passes the scheduler's own list, which grows before the courier's thread reads it.
        told = temperature, truncation, cache_salt, noise
        self._enqueue(functools.partial(self._start, serial, slot, list(token_ids), *told))

    def finish(self, step: int, serials: Sequence[int]) -> None:
        """The requests `serials` ended with `step`; must be called before anything else of that step."""
        self._enqueue(functools.partial(self._finish, step, serials))

    def preempt(self, step: int, serial: int) -> None:
        """Request `serial` was preempted with `step`."""
        self._enqueue(functools.partial(self._preempt, step, serial))

    def end_at(self, serial: int, length: int) -> None:
        """Request `serial` ends at `length` committed tokens at the latest."""
        self._enqueue(functools.partial(self._end_at, serial, length))

    def want(self, num_drafts: int) -> None:
        """Set the number of drafts per round; with 0 the drafter gets no outcomes."""
        self._enqueue(functools.partial(self._want, num_drafts))

    def outcome_buffer(self) -> OutcomeBuffer:
        """A buffer for `await_outcomes`, which is reused once its rows have been read."""
        try:
            return self._buffers.popleft()
        except IndexError:
            return self._new_buffer()

    def await_outcomes(self, step: int, serials: list[int], num_scheduled: list[int], buffer: OutcomeBuffer) -> None:
        """Process the round of `step` once the current stream has written its outcomes to `buffer`.

        serials, num_scheduled: request of each row, and the drafts that vLLM counts in it, including filler
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
        """End the threads and close the drafters."""
        self._stopped = True
        self._on_device.put(None)
        os.eventfd_write(self._wakeup, 1)

    def _enqueue(self, task: Callable[[], None]) -> None:
        """Queue work for the courier's thread, if it still runs."""
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
        """Body of both threads: when one ends or fails, both end, and the target continues without drafts."""
        try:
            if self._cache.device.type == "cuda":
                # Threads start on device 0; using a stream of another device would create a context there.
                torch.cuda.set_device(self._cache.device)
            body()
        except Exception:
            self._logger.exception("SSD: a thread between target and drafter failed; decoding goes on without drafts")
        finally:
            self.stop()

    def _await_device(self) -> None:
        """Wait for outcomes on the device; a separate thread, as `_carry` waits for the drafters."""
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
        """Write the blocks that have arrived to the device, then run all tasks and send their events."""
        try:
            os.eventfd_read(self._wakeup)
        except BlockingIOError:  # woken by a push or a timeout
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
        noise: Noise,
    ) -> None:
        remote = self._client.add(str(serial), temperature, truncation, cache_salt, noise)
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
        """Commit the tokens that a round emitted, and report them to the drafter."""
        self._client.begin_round()
        any_short = False
        rows = round_.buffer.rows[: len(round_.serials)].tolist()
        self._buffers.append(round_.buffer)
        self._verified.take(round_.step, round_.serials, round_.num_scheduled, rows)
        requests = self._requests
        for serial, num_scheduled, row in zip(round_.serials, round_.num_scheduled, rows):
            num_emitted, last, found, _, num_drafts, num_drafted, *drafts = row
            request = requests.get(serial)
            if request is None or not num_emitted:  # it has left since, or is still in prefill
                continue
            k, n, m = num_emitted - 1, request.num_drafted, min(len(request.verifying), num_scheduled)
            if n <= k and n < m:  # the target judged n-gram drafts
                self._ngram_gain.observe(m - n, k - n)
            # Misses count even while no drafts are wanted: the drafter may be away, and n-gram drafts pay again.
            any_short = any_short or found != HIT or num_drafted < self._num_drafts
            request.token_ids += [*request.verifying[:k], last]
            request.verifying, request.num_drafted = drafts[:num_drafts], num_drafted
            if self._num_drafts:
                self._tell(serial, request, found)
        if any_short and self._config.on_miss == "auto":
            self.wants_ngram = self._ngram_gain.drafts(self._config.num_speculative_tokens, NGRAM_LOSS)[0] > 0

    def _tell(self, serial: int, request: SlotRequest, found: int) -> None:
        client, remote, token_ids = self._client, request.remote, request.token_ids
        if self._untold:
            self._untold.discard(serial)
        if len(token_ids) + 2 > request.last_length:  # its next round emits its last token: no more drafts needed
            client.close(remote.request_id)
        elif client.holds(remote):
            client.looked_up(remote, hit=found == HIT, block=found != LATE)
            client.outcome(remote, token_ids[remote.length :], request.verifying)
        else:
            client.open(remote, token_ids, request.verifying)
