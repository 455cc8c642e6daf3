"""All targets of a listening drafter as one transport: their steps are combined, and pushes are split between them.

The engine knows a request as "NUMBER:ID", with the number of its target. Targets are isolated from each other: an
invalid message only ends that target's connection, and a target with too many requests loses its own.
"""

from __future__ import annotations

import logging
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_ssd.drafter.accept import Acceptor
from vllm_ssd.drafter.merging import MAX_MERGED_STEPS, merge_backlog
from vllm_ssd.drafter.ration import PROMPT_TOKENS, Ration
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import (
    Close,
    DrafterStats,
    Evicted,
    Hello,
    Open,
    Outcome,
    Push,
    PushedBlock,
    Refused,
    Step,
    Welcome,
)
from vllm_ssd.link.transport import ProcessTransport, Transport, TransportClosed

HELLO_S = 10.0
"""Time for a target to send its Hello."""
MAX_TENANTS = 64
MAX_HELLO_BYTES = 64 << 20
"""Largest Hello; the strings of MAX_VOCAB_SIZE tokens take less."""
MAX_REQUEST_ID = 1024
"""Most characters of a request id, which every push repeats."""
WITHHELD_BYTES = 4 << 20
"""A target with more unread bytes gets no further blocks until it has read some."""


class Stopped(TransportClosed):
    """Raised by `poll` once the drafter has been asked to end."""


@dataclass(slots=True, eq=False)
class Tenant:
    """One target. hello: None until the handshake."""

    number: int
    peer: str
    transport: ProcessTransport
    deadline: float
    hello: Hello | None = None
    open: dict[str, int] = field(default_factory=dict)  # epochs by request id, longest open first
    lost: str = ""  # why it is to be dropped
    unheard: deque[Any] = field(default_factory=deque)  # received messages beyond its ration
    ration: Ration = field(default_factory=lambda: Ration(1))


class Tenants(Transport):
    """A transport to all targets.

    options: the drafter's own sizes, which every target must accept
    greet: answers a Hello with a Welcome or a Refused
    max_step_bytes: largest message after the handshake
    """

    def __init__(
        self,
        acceptor: Acceptor,
        options: DrafterOptions,
        greet: Callable[[Hello], Welcome | Refused],
        max_step_bytes: int,
        logger: logging.Logger,
    ) -> None:
        self._acceptor = acceptor
        self._options = options
        self._greet = greet
        self._max_step_bytes = max_step_bytes
        self._logger = logger
        self._tenants: dict[int, Tenant] = {}
        self._num_tenants = 0
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopped = False
        self.load = 0, 0
        """Number of served targets and of their open requests, as of the last poll; may be read by any thread."""

    def __len__(self) -> int:
        return sum(tenant.hello is not None for tenant in self._tenants.values())

    def stop(self) -> None:
        """Make `poll` raise `Stopped` from now on; may be called from any thread or signal handler."""
        self._stopped = True
        os.eventfd_write(self._stop, 1)

    # ---- a transport -----------------------------------------------------------------------------------

    def poll(self, timeout_s: float | None = 0.0) -> list[Any]:
        """Return the targets' steps since the last call, with the engine's request ids; reads each target once."""
        self._wait(timeout_s)
        if self._stopped:
            raise Stopped("the drafter was asked to end")
        for stream, peer in self._acceptor.take():
            self._admit(ProcessTransport(stream, "drafter", max_message_bytes=MAX_HELLO_BYTES), peer)
        steps: list[Step] = []
        for tenant in list(self._tenants.values()):
            try:
                self._hear(tenant, steps)
            except TransportClosed as error:
                tenant.lost = tenant.lost or str(error)
            if tenant.lost:
                self._part(tenant, steps)
        self._open_next(steps)
        self.load = len(self), sum(len(tenant.open) for tenant in self._tenants.values())
        return steps

    def send(self, message: Push) -> None:
        """Send each target its part of a push; all targets get the statistics."""
        blocks: dict[int, list[PushedBlock]] = {}
        for pushed in message.each():
            number, request_id = _of_target(pushed.block.request_id)
            block = msgspec.structs.replace(pushed.block, request_id=request_id)
            blocks.setdefault(number, []).append(pushed._replace(block=block))
        evicted: dict[int, list[Evicted]] = {}
        for lost in message.evicted:
            number, request_id = _of_target(lost.request_id)
            evicted.setdefault(number, []).append(Evicted(request_id, lost.epoch))
        for number, tenant in self._tenants.items():
            for lost in evicted.get(number, ()):
                if tenant.open.get(lost.request_id) == lost.epoch:
                    del tenant.open[lost.request_id]
            is_full = tenant.transport.pending_bytes > WITHHELD_BYTES
            push = _push([] if is_full else blocks.get(number, []), evicted.get(number, []), message.stats)
            if tenant.hello is not None and (push.blocks or push.evicted or push.stats or not message.blocks):
                self._tell(tenant, push)

    def close(self) -> None:
        """Close all connections and stop listening."""
        self._acceptor.close()
        for tenant in self._tenants.values():
            tenant.transport.close()
        self._tenants.clear()

    def fileno(self) -> int:
        """Always -1: no single descriptor covers all targets."""
        return -1

    @property
    def pending_bytes(self) -> int:
        return sum(tenant.transport.pending_bytes for tenant in self._tenants.values())

    # ---- targets ---------------------------------------------------------------------------------------

    def _wait(self, timeout_s: float | None) -> None:
        tenants = self._tenants.values()
        if timeout_s == 0 or any(t.lost or t.unheard or t.transport.at_bound or t.ration.waiting for t in tenants):
            return  # there is work already, or a transport that closed in `send` and has no descriptor any more
        poller = select.poll()
        for descriptor in (self._acceptor.fileno(), self._stop):
            poller.register(descriptor, select.POLLIN)
        for tenant in self._tenants.values():
            unsent = select.POLLOUT if tenant.transport.pending_bytes else 0
            poller.register(tenant.transport.fileno(), select.POLLIN | unsent)
            if tenant.hello is None:
                left_s = max(tenant.deadline - time.monotonic(), 0.0)
                timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        poller.poll(None if timeout_s is None else timeout_s * 1e3)

    def _admit(self, transport: ProcessTransport, peer: str) -> None:
        self._num_tenants += 1
        tenant = Tenant(self._num_tenants, peer, transport, time.monotonic() + HELLO_S)
        self._tenants[tenant.number] = tenant
        if len(self._tenants) > MAX_TENANTS:
            self._refuse(tenant, f"the drafter serves {MAX_TENANTS} targets already")

    def _hear(self, tenant: Tenant, steps: list[Step]) -> None:
        if len(tenant.unheard) <= MAX_MERGED_STEPS:
            tenant.unheard += tenant.transport.poll(0.0)
        is_shared = self._is_shared(tenant)
        tenant.ration.next_poll()
        messages = tenant.unheard
        heard: list[Step] = []
        if tenant.hello is None and not messages and time.monotonic() > tenant.deadline:
            tenant.lost = f"no Hello within {HELLO_S:g} s"
        while messages and not tenant.lost and not (is_shared and tenant.ration.is_used_up):
            message = messages.popleft()
            if tenant.hello is None:
                self._shake_hands(tenant, message)
            elif isinstance(message, Step):
                tenant.ration.spoke(1 + len(message.events))
                heard.append(message)
            else:
                tenant.lost = "it sent a second Hello"
        if messages and not tenant.lost:
            most = 2 * tenant.ration.events_a_poll  # outcomes of all its requests, plus some opens and closes
            heard, num_events = merge_backlog(heard, messages, most)
            tenant.ration.spoke(num_events)
        steps += [self._translated(tenant, step) for step in heard]

    def _shake_hands(self, tenant: Tenant, hello: Any) -> None:
        if not isinstance(hello, Hello):
            tenant.lost = "its first message was not a Hello"
            return
        reason = _too_large(self._options, hello)
        answer = Refused(reason) if reason else self._greet(hello)
        if isinstance(answer, Refused):
            self._refuse(tenant, answer.reason)
            return
        tenant.hello = hello = msgspec.structs.replace(hello, vocabulary=[])  # no longer needed
        tenant.transport.limit_messages(self._max_step_bytes)
        tenant.ration = Ration(min(hello.max_num_seqs or self._options.max_num_seqs, self._options.max_num_seqs) + 1)
        self._tell(tenant, answer)
        self._logger.info(
            "SSD: target %d at %s is served, with %d requests at most", tenant.number, tenant.peer, hello.max_num_seqs
        )

    def _refuse(self, tenant: Tenant, reason: str) -> None:
        self._tell(tenant, Refused(reason))
        tenant.lost = f"refused: {reason}"

    def _tell(self, tenant: Tenant, message: Any) -> None:
        try:
            tenant.transport.send(message)
        except TransportClosed as error:
            tenant.lost = tenant.lost or str(error)

    def _part(self, tenant: Tenant, steps: list[Step]) -> None:
        """Drop a target that is gone, and have the engine close its requests."""
        del self._tenants[tenant.number]
        tenant.transport.close()
        if tenant.open:
            steps.append(Step([Close(_for_engine(tenant, request_id)) for request_id in tenant.open], 0))
        self._logger.info("SSD: target %d at %s is gone: %s", tenant.number, tenant.peer, tenant.lost)

    # ---- requests --------------------------------------------------------------------------------------

    def _translated(self, tenant: Tenant, step: Step) -> Step:
        """Translate a target's step to the engine's request ids, within the drafter's limits.

        Events that have to wait for their ration are kept back.
        """
        most = self._options.num_speculative_tokens
        num_drafts = min(step.num_speculative_tokens, most)
        is_shared = self._is_shared(tenant)
        events: list[Open | Outcome | Close] = []
        for event in step.events:
            request_id = event.request_id
            if len(request_id) > MAX_REQUEST_ID:
                tenant.lost = f"a request id of {len(request_id)} characters"
                break
            if isinstance(event, Open):
                events += self._make_room(tenant, event)
                tenant.open.pop(request_id, None)
                tenant.open[request_id] = event.epoch
            elif isinstance(event, Close):
                tenant.open.pop(request_id, None)
            elif event.jit > most:
                event = msgspec.structs.replace(event, jit=most)
            if not tenant.ration.keep(event, num_drafts, is_shared):
                events.append(msgspec.structs.replace(event, request_id=_for_engine(tenant, request_id)))
        return Step(events, num_drafts)

    def _is_shared(self, tenant: Tenant) -> bool:
        """Whether another target has open requests, so that this one is rationed."""
        return any(other.open for other in self._tenants.values() if other is not tenant)

    def _open_next(self, steps: list[Step]) -> None:
        """Open the waiting requests whose turn it is; all of a target without competition."""
        backlogged = [tenant for tenant in self._tenants.values() if tenant.ration.waiting]
        for tenant in backlogged:
            num_tokens = PROMPT_TOKENS / len(backlogged) if self._is_shared(tenant) else math.inf
            for waiting in tenant.ration.grant(num_tokens):
                events = [waiting.opened] if waiting.outcome is None else [waiting.opened, waiting.outcome]
                for_engine = _for_engine(tenant, waiting.opened.request_id)
                renamed = [msgspec.structs.replace(event, request_id=for_engine) for event in events]
                steps.append(Step(renamed, waiting.num_drafts))

    def _make_room(self, tenant: Tenant, event: Open) -> Iterable[Close]:
        """If `event` exceeds a limit, evict the longest open request of this target or of the one with the most."""
        assert tenant.hello is not None
        if event.request_id in tenant.open:
            return
        capacity = self._options.max_num_seqs
        own = min(tenant.hello.max_num_seqs or capacity, capacity)
        total = sum(len(other.open) for other in self._tenants.values())
        if len(tenant.open) >= own:
            loser = tenant
        elif total >= capacity:
            loser = max(self._tenants.values(), key=lambda other: len(other.open))
            loser = tenant if len(loser.open) <= len(tenant.open) + 1 and tenant.open else loser
        else:
            return
        request_id, epoch = next(iter(loser.open.items()))
        del loser.open[request_id]
        loser.ration.waiting.pop(request_id, None)
        self._tell(loser, Push([], [Evicted(request_id, epoch)], None))
        yield Close(_for_engine(loser, request_id))


def _for_engine(tenant: Tenant, request_id: str) -> str:
    return f"{tenant.number}:{request_id}"


def _of_target(name: str) -> tuple[int, str]:
    number, _, request_id = name.partition(":")
    return int(number), request_id


def _push(pushed: Sequence[PushedBlock], evicted: list[Evicted], stats: DrafterStats | None) -> Push:
    """Build a push from some blocks of another push, with their proposals."""
    proposals = [block.proposal_bytes() for block in pushed if block.block.sampled]
    support = pushed[0].push.support if proposals else 0
    q_token_ids, q_probs = (b"".join(parts) for parts in zip(*proposals)) if proposals else (b"", b"")
    return Push([block.block for block in pushed], evicted, stats, support, q_token_ids, q_probs)


def _too_large(options: DrafterOptions, hello: Hello) -> str:
    """Why the drafter's sizes exceed what the target accepts; "" if they do not."""
    if options.num_speculative_tokens < hello.num_speculative_tokens:
        return (
            f"the drafter was started with num_speculative_tokens {options.num_speculative_tokens}, the target has "
            f"{hello.num_speculative_tokens}: start it with as many"
        )
    for name, own, theirs in (
        ("branches of a request (branch_budget or fan_out)", options.max_branches, hello.max_branches),
        ("token ids in a proposal (top_m)", options.max_support, hello.max_support),
    ):
        if own > theirs:
            return f"the drafter has up to {own} {name}, the target takes {theirs}: give both the same keys"
    return ""
