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
#     held       one drafter knows it under `epoch`, up to `length` committed tokens, or
#     too long   it has outgrown every drafter's context, which is final.
#
#     what happens                                 from             to          event
#     ------------------------------------------   --------------   ---------   ------------------------------
#     add                                                           not held
#     open, with a drafter and no back-off         not held, held   held        Open: all tokens, a new epoch
#     open, otherwise                              not held, held   not held    Close if it was held
#     outcome                                      held             held        Outcome: `length` grows
#     outcome beyond `max_length` of its drafter   held             not held    Close
#     open or outcome beyond that of every one     not held, held   too long    Close if it was held
#     `Evicted` with its epoch                     held             not held    none; back-off begins
#     a new drafter process shakes hands           held             not held    none
#     open, its drafter abandoned for another      held             held        Close there, Open elsewhere
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
# 7. Any drafter of the fleet drafts for any request. A request stays where it is while its drafter answers; opened anew
#    it goes to the drafter that knows its first tokens, if that is not much busier, or else to the less busy one of two
#    chosen at random (Mitzenmacher, "The power of two choices", 2001). Those that a lost drafter leaves behind are read
#    by the others in pieces, so that the rounds of their own requests do not come late.

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import (
    ALL_TOKENS,
    Close,
    Evicted,
    Open,
    Outcome,
    Push,
    SpeculationBlock,
    Truncation,
    pack_ids,
)
from vllm_ssd.target.members import Member, Members
from vllm_ssd.target.metrics import Metrics

REOPEN_ROUNDS = 32
"""Rounds an evicted request waits before it is opened again; doubled with each eviction."""

SILENT_ROUNDS = 8
"""Rounds in a row that a drafter was told of and pushed nothing for, from which it is taken to compile or the like."""

NOT_HELD = -1
"""Generation of no drafter."""


@dataclass(slots=True)
class RemoteRequest:
    """One request as the drafter knows it; only `DrafterClient` changes it."""

    request_id: str
    temperature: float
    truncation: Truncation = ALL_TOKENS
    cache_salt: bytes = b""
    epoch: int = 0
    length: int = 0  # committed tokens that the drafter was told of
    member: int = 0  # index of the drafter that holds it, or held it last
    generation: int = NOT_HELD  # of the drafter that holds it
    behind_until: int = 0  # the length whose block shows that the drafter has read what it was told; 0: it has
    too_long: bool = False
    evictions: int = 0
    reopen_round: int = 0  # back-off ends


class DrafterClient:
    """Open, outcome, close and poll: the target's side of the conversation with its drafters.

    `keep_blocks` gets a push, from `poll`, its accepted blocks, and the first proposal of each there; other blocks are
    counted as stale.
    """

    def __init__(
        self,
        config: SSDConfig,
        fleet: Fleet,
        metrics: Metrics,
        keep_blocks: Callable[[Push, list[SpeculationBlock], list[int]], None],
    ) -> None:
        self._fleet = fleet
        self._members = Members(fleet, reserve=2 * config.num_speculative_tokens + 2)
        self._joined = self._members.joined
        self._metrics = metrics
        self._keep_blocks = keep_blocks
        self._requests: dict[str, RemoteRequest] = {}
        self._behind: dict[str, RemoteRequest] = {}
        self._most_emitted = config.num_speculative_tokens + 1  # in one round
        self._epochs = itertools.count(1)
        self._round = 0

    @property
    def connected(self) -> bool:
        """Whether there is a drafter now."""
        return self._fleet.connected

    @property
    def in_time(self) -> bool:
        """Whether there is a drafter and none is still reading what it was told, or busy with something else.

        While one is, rounds say nothing about what its drafts are worth.
        """
        if not self._fleet.connected:
            return False
        for member in self._joined:
            if member.silent_rounds >= SILENT_ROUNDS:
                return False
        return not self._behind or not any(map(self._is_known, self._behind.values()))

    def holds(self, request: RemoteRequest) -> bool:
        """Whether a drafter holds the request, as far as the target was told, and is not abandoned for another."""
        if request.generation == NOT_HELD:
            return False
        member = self._joined[request.member]
        return request.generation == member.link.generation and not member.abandoned

    def reaches(self, request: RemoteRequest) -> bool:
        """Whether the drafter that holds the request is there."""
        return self.holds(request) and self._joined[request.member].link.connected

    def may_wait(self, request: RemoteRequest, length: int) -> bool:
        """Whether its drafter can be asked to hurry with a request of `length` committed tokens; not while it still
        owes what was waited for."""
        if not self.reaches(request):
            return False
        member = self._joined[request.member]
        return not member.awaiting_push and length <= member.max_length

    def begin_round(self) -> None:
        """A round of the target passes; back-off is counted in them."""
        self._round += 1
        for member in self._joined:
            member.silent_rounds = member.silent_rounds + 1 if member.was_told else 0
            member.was_told = False

    # ---- towards the drafters --------------------------------------------------------------------------

    def add(
        self, request_id: str, temperature: float, truncation: Truncation = ALL_TOKENS, cache_salt: bytes = b""
    ) -> RemoteRequest:
        """A new request, not held yet; one of the same id is closed."""
        self.close(request_id)
        request = RemoteRequest(request_id, temperature, truncation, cache_salt)
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
        if not self._fleet.connected or self._round < request.reopen_round:
            self._release(request)
            return False
        if len(token_ids) > self._members.max_length:
            self._retire(request)
            return False
        held_by = request.member if self.reaches(request) else None
        member = self._members.choose(token_ids, held_by, reopened=held_by is None and request.epoch > 0)
        if member is None:
            self._release(request)
            return False
        member.catch_up()
        if held_by != member.index:
            self._release(request)
            member.num_held += 1
        request.epoch = next(self._epochs)
        request.length = len(token_ids)
        request.member, request.generation = member.index, member.link.generation
        self._await(request)
        member.reading[request.request_id] = len(token_ids)
        tokens = pack_ids(token_ids)
        sampling = request.temperature, request.truncation
        member.enqueue(Open(request.request_id, request.epoch, tokens, *sampling, request.cache_salt))
        if draft_token_ids:
            self.outcome(request, [], list(draft_token_ids))
        return True

    def outcome(self, request: RemoteRequest, emitted: list[int], draft_token_ids: list[int], jit: int = 0) -> None:
        """Tell what was emitted since `request.length`, and the drafts now under verification (`protocol.Outcome`)."""
        if request.generation == NOT_HELD:
            return
        member = self._joined[request.member]
        link = member.link
        if request.generation != link.generation:
            return
        length = request.length + len(emitted)
        if length > link.max_model_len - member.reserve:  # its `max_length`, without a call
            (self._retire if length > self._members.max_length else self._release)(request)
            return
        request.length = length
        if len(emitted) > self._most_emitted:  # of several rounds, in which nothing was wanted
            self._await(request)
        member.was_told = True
        member.enqueue(Outcome(request.request_id, request.epoch, length, emitted, draft_token_ids, jit))

    def looked_up(self, request: RemoteRequest, *, hit: bool, block: bool) -> None:
        """The outcome of a held request was found in its block, was not in it, or there was no block yet."""
        self._metrics.outcome(hit=hit, block=block, index=request.member)
        self._joined[request.member].looked_up(not hit and not block)

    def close(self, request_id: str) -> None:
        """Forget a request; unknown ones are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._release(request)
            self._behind.pop(request_id, None)

    def send(self, num_drafts: int) -> None:
        """Send what was queued, if anything; `num_drafts` are wanted for each coming round."""
        for member in self._joined:
            member.send(num_drafts)

    def _await(self, request: RemoteRequest) -> None:
        """Its drafter has more to read than a round's tokens."""
        request.behind_until = request.length
        self._behind[request.request_id] = request

    def _is_known(self, request: RemoteRequest) -> bool:
        """Whether the drafter process that it was opened on is still the one there, answering or not."""
        generation = request.generation
        return generation != NOT_HELD and generation == self._joined[request.member].link.generation

    def _retire(self, request: RemoteRequest) -> None:
        self._release(request)
        request.too_long = True
        self._metrics.too_long(request.request_id)

    def _release(self, request: RemoteRequest) -> None:
        if self._is_known(request):
            member = self._joined[request.member]
            member.enqueue(Close(request.request_id))
            self._left(request, member)
        request.generation = NOT_HELD

    def _left(self, request: RemoteRequest, member: Member) -> None:
        member.catch_up()
        member.num_held -= 1
        self._behind.pop(request.request_id, None)
        member.reading.pop(request.request_id, None)

    # ---- from the drafters -----------------------------------------------------------------------------

    def poll(self, timeout_s: float = 0.0, waiting: Collection[RemoteRequest] = ()) -> None:
        """Take what the drafters have pushed, waiting at most `timeout_s` when there is nothing.

        waiting: the requests that the wait is for.
        """
        pushes = self._fleet.poll(timeout_s)
        for request in waiting:
            self._joined[request.member].awaiting_push = True
        for index, push in pushes:
            member = self._members[index]
            member.awaiting_push = False
            if push.blocks or push.evicted or push.stats is not None:  # else it only says that it compiles
                member.silent_rounds, member.was_told = 0, False
            if push.blocks:
                self._take_blocks(push, member)
            for evicted in push.evicted:
                self._take_eviction(evicted, index)
            if push.stats is not None:
                self._metrics.drafter(push.stats, member.link.generation, index)
        self._members.look_around()

    def _take_blocks(self, push: Push, member: Member) -> None:
        requests, index, generation, first = self._requests, member.index, member.link.generation, 0
        kept: list[SpeculationBlock] = []
        firsts: list[int] = []
        for block in push.blocks:
            request = requests.get(block.request_id)
            if (
                request is None
                or request.member != index
                or request.generation != generation  # as NOT_HELD does, too
                or block.epoch != request.epoch
            ):
                self._metrics.stale_block()
            else:
                if request.behind_until and block.length >= request.behind_until:
                    request.behind_until = 0
                    self._behind.pop(block.request_id, None)
                    member.reading.pop(block.request_id, None)
                if block.length == request.length and block.fits:
                    kept.append(block)
                    firsts.append(first)
                else:
                    self._metrics.stale_block()
            if block.sampled:
                first += len(block.draft_token_ids) // 4  # num_proposals, without a call
        if kept:
            self._keep_blocks(push, kept, firsts)

    def _take_eviction(self, evicted: Evicted, index: int) -> None:
        request = self._requests.get(evicted.request_id)
        if request is None or request.member != index or request.epoch != evicted.epoch or not self._is_known(request):
            return
        self._left(request, self._members[index])
        request.generation = NOT_HELD
        request.reopen_round = self._round + (REOPEN_ROUNDS << min(request.evictions, 6))
        request.evictions += 1
