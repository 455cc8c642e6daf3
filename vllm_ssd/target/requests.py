"""The state of each request on its drafter, and the only code that sends events about it."""

# Theory of operation
#
# The target opens each request on the drafter, reports the outcome of every round and closes the request when it ends.
# The drafter pushes speculation blocks, and answers `Evicted` for a request that it does not hold. Both model runners
# use a `DrafterClient`, which knows nothing of drafts, batches or devices: its owner reports what happened, and the
# client decides which events follow and queues them until `send`.
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
# 1. Calls that the state forbids are ignored silently: an outcome of a request that is not held is dropped, a request
#    that is too long is never opened again. The target continues without drafts in either case.
# 2. An epoch is used once, over all requests. A block is accepted only for the current epoch and `length` of a held
#    request, so neither a preempted request nor a reused request id can meet blocks of its past. All others are stale.
# 3. `length` never falls within an epoch. A request whose committed length did fall is opened again.
# 4. The drafter process that holds a request is known by its `generation`. A new process makes every held request
#    "not held" without a pass over them; events queued for the one before it are dropped.
# 5. The drafter answers every outcome of an evicted request, including those in flight; only the first answer counts.
#    Each eviction doubles the back-off, so that requests which do not fit together do not evict each other forever.
# 6. `max_length` leaves the room that the drafter requires for the drafts of two rounds, so the drafter never evicts a
#    request for its length.
# 7. Any drafter of the fleet can serve any request. A request stays on its drafter while that answers. When it is
#    opened, it goes to the drafter that knows its first tokens, unless that is much busier, or else to the less busy of
#    two chosen at random (Mitzenmacher, "The power of two choices", 2001). Requests of a lost drafter are reopened a
#    few at a time, so that their prefill does not delay the other drafters' own requests.

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.link.protocol import (
    ALL_TOKENS,
    NO_NOISE,
    Close,
    Evicted,
    Noise,
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
"""Rounds before an evicted request is opened again; doubled with each eviction."""

SILENT_ROUNDS = 8
"""Consecutive rounds without a push after which a drafter counts as busy with something else, such as compiling."""

NOT_HELD = -1
"""`generation` of a request that no drafter holds."""


@dataclass(slots=True)
class RemoteRequest:
    """A request's state on its drafter; only `DrafterClient` changes it."""

    request_id: str
    temperature: float
    truncation: Truncation = ALL_TOKENS
    cache_salt: bytes = b""
    noise: Noise = NO_NOISE
    epoch: int = 0
    length: int = 0  # committed tokens that were reported to the drafter
    member: int = 0  # index of the drafter that holds it, or held it last
    generation: int = NOT_HELD  # generation of the drafter process that holds it
    behind_until: int = 0  # a block for this length shows that the drafter has caught up; 0 if it has
    too_long: bool = False
    evictions: int = 0
    reopen_round: int = 0  # round in which the back-off ends


class DrafterClient:
    """The target's side of the protocol with its drafters: open, outcome, close and poll.

    keep_blocks: called by `poll` with a push, its accepted blocks, and the index of each block's first proposal; other
    blocks are counted as stale
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
        """Whether any drafter is connected."""
        return self._fleet.connected

    @property
    def in_time(self) -> bool:
        """Whether a drafter is connected and none is catching up or busy with something else.

        Otherwise a round's measurements do not reflect what drafts are worth.
        """
        if not self._fleet.connected:
            return False
        for member in self._joined:
            if member.silent_rounds >= SILENT_ROUNDS:
                return False
        return not self._behind or not any(map(self._is_known, self._behind.values()))

    def holds(self, request: RemoteRequest) -> bool:
        """Whether a drafter holds the request, as far as the target knows, and has not been abandoned."""
        if request.generation == NOT_HELD:
            return False
        member = self._joined[request.member]
        return request.generation == member.link.generation and not member.abandoned

    def reaches(self, request: RemoteRequest) -> bool:
        """Whether the drafter that holds the request is connected."""
        return self.holds(request) and self._joined[request.member].link.connected

    def may_wait(self, request: RemoteRequest, length: int) -> bool:
        """Whether the request, at `length` committed tokens, may wait for just-in-time drafts.

        Not while its drafter still owes a push from an earlier wait.
        """
        if not self.reaches(request):
            return False
        member = self._joined[request.member]
        return not member.awaiting_push and length <= member.max_length

    def begin_round(self) -> None:
        """Start a new round of the target; back-off is counted in rounds."""
        self._round += 1
        for member in self._joined:
            member.silent_rounds = member.silent_rounds + 1 if member.was_told else 0
            member.was_told = False

    # ---- towards the drafters --------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        temperature: float,
        truncation: Truncation = ALL_TOKENS,
        cache_salt: bytes = b"",
        noise: Noise = NO_NOISE,
    ) -> RemoteRequest:
        """Register a new request, which is not held yet; closes an earlier one with the same id."""
        self.close(request_id)
        request = RemoteRequest(request_id, temperature, truncation, cache_salt, noise)
        self._requests[request_id] = request
        return request

    def open(
        self, request: RemoteRequest, token_ids: Sequence[int] | np.ndarray, draft_token_ids: Sequence[int] = ()
    ) -> bool:
        """Open or reopen the request; returns False if it cannot be opened now.

        token_ids: all its committed tokens; draft_token_ids: the drafts under verification
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
        member.enqueue(Open(request.request_id, request.epoch, tokens, *sampling, request.cache_salt, request.noise))
        if draft_token_ids:
            self.outcome(request, [], list(draft_token_ids))
        return True

    def outcome(self, request: RemoteRequest, emitted: list[int], draft_token_ids: list[int], jit: int = 0) -> None:
        """Report the tokens emitted since `request.length` and the drafts under verification (`protocol.Outcome`)."""
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
        if len(emitted) > self._most_emitted:  # covers several rounds, in which no drafts were wanted
            self._await(request)
        member.was_told = True
        member.enqueue(Outcome(request.request_id, request.epoch, length, emitted, draft_token_ids, jit))

    def looked_up(self, request: RemoteRequest, *, hit: bool, block: bool) -> None:
        """Count the lookup of a held request's outcome; block: whether any block had arrived."""
        self._metrics.outcome(hit=hit, block=block, index=request.member)
        self._joined[request.member].looked_up(not hit and not block)

    def close(self, request_id: str) -> None:
        """Close a request; unknown ones are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._release(request)
            self._behind.pop(request_id, None)

    def send(self, num_drafts: int) -> None:
        """Send the queued events, if any; num_drafts: drafts wanted in each following round."""
        for member in self._joined:
            member.send(num_drafts)

    def _await(self, request: RemoteRequest) -> None:
        """Mark the request as behind: its drafter has more to read than a round's tokens."""
        request.behind_until = request.length
        self._behind[request.request_id] = request

    def _is_known(self, request: RemoteRequest) -> bool:
        """Whether the drafter process that holds the request has not been replaced."""
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
        """Process the drafters' pushes; without any, wait up to `timeout_s`.

        waiting: the requests on whose behalf this waits
        """
        pushes = self._fleet.poll(timeout_s)
        for request in waiting:
            self._joined[request.member].awaiting_push = True
        for index, push in pushes:
            member = self._members[index]
            member.awaiting_push = False
            if push.blocks or push.evicted or push.stats is not None:  # an empty push is a heartbeat while compiling
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
                or request.generation != generation  # includes NOT_HELD
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
