"""What the target knows of its requests on the drafter, and what both sides say about them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.protocol import Close, Open, Outcome, Proposal, Push, SpeculationBlock, Step, common_prefix, pack_ids
from vllm_ssd.target.metrics import Metrics

REOPEN_ROUNDS = 32
"""Rounds an evicted request waits before it is opened again; doubled with each eviction."""


class Link(Protocol):
    """A connection to a drafter that may die and come back; none of its calls blocks or raises."""

    generation: int
    """Grows whenever a new drafter process has come up; 0 while there never was one."""
    connected: bool
    max_model_len: int

    def send(self, step: Step) -> None: ...

    def poll(self, timeout_s: float = 0.0) -> list[Push]: ...


@dataclass(slots=True)
class Speculation:
    """Draft tokens and, where they were sampled, the proposal of each (None: declared one-hot)."""

    token_ids: list[int] = field(default_factory=list)
    proposals: list[Proposal | None] = field(default_factory=list)

    def since(self, start: int, stop: int | None = None) -> Speculation:
        """The drafts from `start` to `stop`."""
        return Speculation(self.token_ids[start:stop], self.proposals[start:stop])


@dataclass(slots=True)
class Session:
    """What the target knows of one request on the drafter."""

    request_id: str
    temperature: float
    length: int  # committed tokens that the drafter was told of
    min_length: int = 0  # committed tokens below which stop tokens are censored (`min_tokens`)
    epoch: int = 0
    generation: int = -1  # of the drafter that holds this request; -1: none does
    drafts: Speculation = field(default_factory=Speculation)  # named to the drafter at `length`
    by_ngram: bool = False  # `drafts` are what followed an earlier n-gram
    blocks: list[SpeculationBlock] = field(default_factory=list)  # pushed for the outcome at `length`, in order
    heard: bool = False  # since it was opened, a block has come
    evictions: int = 0
    reopen_round: int = 0

    def expects(self, block: SpeculationBlock) -> bool:
        """Whether a block answers this committed length, in this epoch, and is not broken."""
        return block.epoch == self.epoch and block.length == self.length and block.fits

    def take(self, block: SpeculationBlock) -> bool:
        """Keep a pushed block; False when it answers another committed length or epoch, or is broken."""
        if not self.expects(block):
            return False
        self.blocks.append(block)
        self.heard = True
        return True

    def lookup(self, accept_length: int, bonus_token_id: int) -> Speculation:
        """What was pushed for one outcome so far; empty when it was not predicted."""
        found = Speculation()
        for block in self.blocks:
            branch = block.find(accept_length, bonus_token_id)
            if branch >= 0 and block.offset == len(found.token_ids):
                drafts = block.drafts(branch)
                found.token_ids += drafts
                found.proposals += block.proposals(branch) or [None] * len(drafts)
        return found

    def most_drafts(self, wanted: int, length: int) -> int:
        """Drafts that a round starting at `length` may carry.

        vLLM censors the bonus token of a round by where the round starts (`MinTokensLogitsProcessor`, 0.30 to 0.32):
        a round must not reach over `min_length`, or a stop token due there would be lost.
        """
        return wanted if length >= self.min_length else min(wanted, self.min_length - length - 1)

    def follow(self, emitted: list[int]) -> Speculation:
        """What was speculated after `emitted`, the tokens since `length`; empty when nothing was.

        Usually `emitted` is an accepted prefix of the drafts and a bonus token. It may also end inside the
        drafts (the scheduler verified fewer: the rest of them stands) or cover several rounds.
        """
        drafts = self.drafts.token_ids
        k = common_prefix(emitted, drafts)
        if k == len(emitted):
            return self.drafts.since(k)
        branch = self.lookup(k, emitted[k])
        rest = emitted[k + 1 :]
        return branch.since(len(rest)) if branch.token_ids[: len(rest)] == rest else Speculation()


S = TypeVar("S", bound=Session)


class Sessions(Generic[S]):
    """The open requests and their link to the drafter; whoever turns outcomes into drafts is built on it."""

    def __init__(self, config: SSDConfig, link: Link, metrics: Metrics) -> None:
        self._config = config
        self._link = link
        self._metrics = metrics
        self._sessions: dict[str, S] = {}
        self._closing: list[Close] = []
        self._epochs = itertools.count(1)  # of all requests: an id that comes again must not meet its old blocks
        self._round = 0

    def finish_requests(self, request_ids: Iterable[str]) -> None:
        """Forget requests; the drafter hears of it with the next step."""
        for request_id in request_ids:
            session = self._sessions.pop(request_id, None)
            if session is not None and session.generation == self._link.generation:
                self._closing.append(Close(request_id))
        if self._closing and not self._sessions:
            self._send([])

    def _send(self, events: list[Open | Outcome | Close], wanted: int | None = None) -> None:
        closing, self._closing = self._closing, []
        k = self._config.num_speculative_tokens if wanted is None else wanted
        self._link.send(Step([*closing, *events], k))

    def _open(self, session: S, token_ids: Sequence[int] | np.ndarray) -> list[Open]:
        """Open `session` anew from all its committed tokens, unless the drafter cannot hold them."""
        session.epoch = next(self._epochs)
        session.length = len(token_ids)
        session.drafts, session.blocks, session.heard = Speculation(), [], False
        room = self._link.max_model_len - 2 * self._config.num_speculative_tokens - 2
        if not self._link.connected or len(token_ids) > room:
            session.generation = -1
            return []
        session.generation = self._link.generation
        return [Open(session.request_id, session.epoch, pack_ids(token_ids), session.temperature)]

    def _reopen(self, session: S, token_ids: Sequence[int] | np.ndarray) -> list[Open]:
        if self._round < session.reopen_round:
            return []
        return self._open(session, token_ids)

    def _absorb(self, pushes: list[Push]) -> None:
        for push in pushes:
            for block in push.blocks:
                session = self._sessions.get(block.request_id)
                if session is None or not self._take(session, block):
                    self._metrics.stale_block()
            for evicted in push.evicted:
                session = self._sessions.get(evicted.request_id)
                if session is not None and session.epoch == evicted.epoch and session.generation >= 0:
                    session.generation = -1  # outcomes under way when it was evicted are answered so, too: once counts
                    session.reopen_round = self._round + (REOPEN_ROUNDS << min(session.evictions, 6))
                    session.evictions += 1
            if push.stats is not None:
                self._metrics.drafter(push.stats, self._link.generation)

    def _take(self, session: S, block: SpeculationBlock) -> bool:
        """Keep a pushed block; False when it answers another committed length or epoch."""
        return session.take(block)
