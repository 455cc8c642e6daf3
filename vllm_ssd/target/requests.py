"""What the drafter was told of each request, and the one way to tell it more."""

# Theory of operation
#
# The target opens each request on the drafter, tells it the outcome of every round and closes the request when it
# ends. The drafter pushes speculation blocks, and answers `Evicted` for a request that it does not hold. Both model
# runners talk to it through one `DrafterClient`, which knows nothing of drafts, batches or devices: its owner says what
# happened, the client decides what may be said about it and queues that until `send`.
#
# A request is
#
#     not held   the drafter does not know it,
#     held       the drafter knows it under `epoch`, up to `length` committed tokens, or
#     too long   it has outgrown the drafter's context, which is final.
#
#     what happens                                 from             to          event
#     ------------------------------------------   --------------   ---------   ------------------------------
#     add                                                           not held
#     open, with a drafter and no back-off         not held, held   held        Open: all tokens, a new epoch
#     open, otherwise                              not held, held   not held    Close if it was held
#     outcome                                      held             held        Outcome: `length` grows
#     open or outcome beyond `max_length`          not held, held   too long    Close if it was held
#     `Evicted` with its epoch                     held             not held    none; back-off begins
#     a new drafter process shakes hands           held             not held    none
#     close                                        any              forgotten   Close if it was held
#
# 1. Whoever asks for what the state forbids is refused, quietly: an outcome of a request that is not held is dropped,
#    a request that is too long is never opened again. The target goes on without drafts either way.
# 2. An epoch is used once, over all requests. A block is accepted only for the current epoch and `length` of a held
#    request, so neither a preempted request nor a reused request id can meet blocks of its past. All others are stale.
# 3. `length` never falls within an epoch. A request whose committed length did fall is opened again.
# 4. The drafter process that holds a request is known by its `generation`. A new process makes every held request
#    "not held" without a pass over them; events queued for the one before it are dropped.
# 5. The drafter answers each outcome of a request it has evicted, those under way included: only the first counts.
#    Each eviction doubles the back-off, so that requests which do not fit together do not evict each other for ever.
# 6. `max_length` leaves the room that the drafter insists on, for the drafts of two rounds: it never evicts a request
#    for its length.

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.protocol import (
    ALL_TOKENS,
    Close,
    Evicted,
    Open,
    Outcome,
    Push,
    SpeculationBlock,
    Step,
    Truncation,
    pack_ids,
)
from vllm_ssd.target.metrics import Metrics

REOPEN_ROUNDS = 32
"""Rounds an evicted request waits before it is opened again; doubled with each eviction."""

NOT_HELD = -1
"""Generation of no drafter."""


class Link(Protocol):
    """A connection to a drafter that may die and come back; none of its calls blocks or raises."""

    generation: int
    """Grows whenever a new drafter process has come up; 0 while there never was one."""
    connected: bool
    max_model_len: int

    def send(self, step: Step) -> None: ...

    def poll(self, timeout_s: float = 0.0) -> list[Push]: ...


@dataclass(slots=True)
class RemoteRequest:
    """One request as the drafter knows it; only `DrafterClient` changes it."""

    request_id: str
    temperature: float
    truncation: Truncation = ALL_TOKENS
    epoch: int = 0
    length: int = 0  # committed tokens that the drafter was told of
    generation: int = NOT_HELD  # of the drafter that holds it
    awaiting_first_block: bool = False  # none has come in this epoch: the drafter may still read the prompt
    too_long: bool = False
    evictions: int = 0
    reopen_round: int = 0  # back-off ends


class DrafterClient:
    """Open, outcome, close and poll: the target's side of the conversation with a drafter.

    `keep_block` gets each accepted block, from `poll`; others are counted as stale.
    """

    def __init__(
        self, config: SSDConfig, link: Link, metrics: Metrics, keep_block: Callable[[SpeculationBlock], None]
    ) -> None:
        self._num_speculative_tokens = config.num_speculative_tokens
        self._link = link
        self._metrics = metrics
        self._keep_block = keep_block
        self._requests: dict[str, RemoteRequest] = {}
        self._epochs = itertools.count(1)
        self._round = 0
        self._events: list[Open | Outcome | Close] = []
        self._events_generation = 0  # of the drafter that `_events` are for
        self.awaiting_push = False
        """Whether the last poll that waited ended without a push, and none has come since."""

    @property
    def connected(self) -> bool:
        """Whether there is a drafter now."""
        return self._link.connected

    @property
    def max_length(self) -> int:
        """Committed tokens that a held request may have."""
        return self._link.max_model_len - 2 * self._num_speculative_tokens - 2

    def holds(self, request: RemoteRequest) -> bool:
        """Whether the drafter holds the request, as far as the target was told."""
        return request.generation == self._link.generation

    def begin_round(self) -> None:
        """A round of the target passes; back-off is counted in them."""
        self._round += 1

    # ---- towards the drafter ---------------------------------------------------------------------------

    def add(self, request_id: str, temperature: float, truncation: Truncation = ALL_TOKENS) -> RemoteRequest:
        """A new request, not held yet; one of the same id is closed."""
        self.close(request_id)
        request = RemoteRequest(request_id, temperature, truncation)
        self._requests[request_id] = request
        return request

    def open(
        self, request: RemoteRequest, token_ids: Sequence[int] | np.ndarray, draft_token_ids: Sequence[int] = ()
    ) -> bool:
        """Open the request anew and name the drafts under verification; False where it cannot be opened now.

        token_ids: all its committed tokens.
        """
        if request.too_long:
            return False
        if not self._link.connected or self._round < request.reopen_round:
            self._release(request)
            return False
        if len(token_ids) > self.max_length:
            self._retire(request)
            return False
        request.epoch = next(self._epochs)
        request.length = len(token_ids)
        request.generation = self._link.generation
        request.awaiting_first_block = True
        tokens = pack_ids(token_ids)
        self._enqueue(Open(request.request_id, request.epoch, tokens, request.temperature, request.truncation))
        if draft_token_ids:
            self.outcome(request, [], list(draft_token_ids))
        return True

    def outcome(self, request: RemoteRequest, emitted: list[int], draft_token_ids: list[int], jit: int = 0) -> None:
        """Tell what was emitted since `request.length`, and the drafts now under verification (`protocol.Outcome`)."""
        if request.generation != self._link.generation:
            return
        length = request.length + len(emitted)
        if length > self.max_length:
            self._retire(request)
            return
        request.length = length
        self._enqueue(Outcome(request.request_id, request.epoch, length, emitted, draft_token_ids, jit))

    def close(self, request_id: str) -> None:
        """Forget a request; unknown ones are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._release(request)

    def send(self, num_drafts: int) -> None:
        """Send what was queued, if anything; `num_drafts` are wanted for each coming round."""
        if not self._events:
            return
        events, self._events = self._events, []
        if self._events_generation == self._link.generation:
            self._link.send(Step(events, num_drafts))

    def _retire(self, request: RemoteRequest) -> None:
        self._release(request)
        request.too_long = True
        self._metrics.too_long(request.request_id)

    def _release(self, request: RemoteRequest) -> None:
        if self.holds(request):
            self._enqueue(Close(request.request_id))
        request.generation = NOT_HELD

    def _enqueue(self, event: Open | Outcome | Close) -> None:
        if self._events_generation != self._link.generation:
            self._events, self._events_generation = [], self._link.generation
        self._events.append(event)

    # ---- from the drafter ------------------------------------------------------------------------------

    def poll(self, timeout_s: float = 0.0) -> None:
        """Take what the drafter has pushed, waiting at most `timeout_s` when there is nothing."""
        pushes = self._link.poll(timeout_s)
        self.awaiting_push = not pushes and (self.awaiting_push or timeout_s > 0)
        for push in pushes:
            for block in push.blocks:
                self._take_block(block)
            for evicted in push.evicted:
                self._take_eviction(evicted)
            if push.stats is not None:
                self._metrics.drafter(push.stats, self._link.generation)

    def _take_block(self, block: SpeculationBlock) -> None:
        request = self._requests.get(block.request_id)
        if (
            request is None
            or block.epoch != request.epoch
            or block.length != request.length
            or not self.holds(request)
            or not block.fits
        ):
            self._metrics.stale_block()
            return
        request.awaiting_first_block = False
        self._keep_block(block)

    def _take_eviction(self, evicted: Evicted) -> None:
        request = self._requests.get(evicted.request_id)
        if request is None or request.epoch != evicted.epoch or not self.holds(request):
            return
        request.generation = NOT_HELD
        request.reopen_round = self._round + (REOPEN_ROUNDS << min(request.evictions, 6))
        request.evictions += 1
