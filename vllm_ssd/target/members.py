"""Which drafter of a fleet drafts for a request."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_ssd.link.fleet import Fleet, Link
from vllm_ssd.link.protocol import Close, Open, Outcome, Step

MAX_REOPENED_TOKENS = 8192
"""Tokens of requests from elsewhere that a drafter of a fleet reads at a time, or one request."""
LATE_ROUNDS = 128
"""Over about so many outcomes the share that found no block of its drafter is averaged."""
MAX_LATE_SHARE = 0.5
"""A drafter of a fleet that is later gets no new requests, but for one to try now and then."""
FORGIVEN = 1 / 16
"""Of its late share, for each request that it would else have had a chance to get."""
PREFIX_TOKENS = 64
"""Requests that share so many first tokens go to one drafter, which may have their pages."""
MAX_PREFIXES = 4096
PREFIX_LOAD = 1.25
"""How much busier than the least busy drafter the one that knows the prefix may be, with one request to spare."""


@dataclass(slots=True, eq=False)
class Member:
    """One drafter of the fleet as the target knows it."""

    index: int
    link: Link
    reserve: int  # tokens of its context that are kept for drafts
    generation: int = 0  # of the drafter process that all below is about
    events: list[Open | Outcome | Close] = field(default_factory=list)  # not sent yet
    num_held: int = 0
    reading: dict[str, int] = field(default_factory=dict)  # tokens of requests that it has pushed nothing for yet
    awaiting_push: bool = False  # it was waited for in vain, and has pushed nothing since
    was_told: bool = False  # in this round, and has pushed nothing since
    silent_rounds: int = 0  # rounds in a row of which that was true
    abandoned: bool = False  # it is gone or owes an answer for long, and there is another that is sound
    late_share: float = 0.0

    @property
    def max_length(self) -> int:
        """Committed tokens that a request may have there."""
        return self.link.max_model_len - self.reserve

    def catch_up(self) -> None:
        """Forget what was about an earlier drafter process."""
        if self.generation != self.link.generation:
            self.generation, self.events, self.num_held = self.link.generation, [], 0
            self.reading, self.late_share, self.awaiting_push = {}, 0.0, False
            self.was_told, self.silent_rounds = False, 0

    def enqueue(self, event: Open | Outcome | Close) -> None:
        """Queue an event for `send`."""
        if self.generation != self.link.generation:
            self.catch_up()
        self.events.append(event)

    def send(self, num_drafts: int) -> None:
        """Send what was queued for the drafter that is there, if anything."""
        if self.events:
            events, self.events = self.events, []
            if self.generation == self.link.generation:
                self.link.send(Step(events, num_drafts))

    def looked_up(self, late: bool) -> None:
        """An outcome of one of its requests found a block of its own, or none."""
        self.late_share += (late - self.late_share) / LATE_ROUNDS


class Members:
    """The drafters of a fleet, which may grow; chooses one for each request that is opened."""

    def __init__(self, fleet: Fleet, reserve: int) -> None:
        self._fleet = fleet
        self._reserve = reserve
        self.joined: list[Member] = []
        """Those that have joined, by index; what is asked several times a request and round goes without a call."""
        self._welcome()
        self._random = random.Random()
        self._prefixes: OrderedDict[bytes, int] = OrderedDict()  # first tokens: index of the member, last used last

    def __getitem__(self, index: int) -> Member:
        if index >= len(self.joined):
            self._welcome()
        return self.joined[index]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.joined)

    @property
    def max_length(self) -> int:
        """Committed tokens that a request may have anywhere; drafters that are gone may come back."""
        self._welcome()  # a target that was idle has not polled since they joined
        return max((member.max_length for member in self.joined), default=0)

    def _welcome(self) -> None:
        for index in range(len(self.joined), len(self._fleet)):
            self.joined.append(Member(index, self._fleet.links[index], self._reserve))

    def look_around(self) -> None:
        """After each poll, and before a choice: abandon drafters that are gone or silent while there is another one."""
        self._welcome()
        if len(self.joined) > 1:
            sound = [member.link.connected and not member.link.suspect for member in self.joined]
            for member, is_sound in zip(self.joined, sound):
                if member.abandoned and is_sound:
                    member.late_share = 0.0  # that was its silence
                member.abandoned = not is_sound and any(sound)

    def choose(self, token_ids: Sequence[int] | np.ndarray, held_by: int | None, reopened: bool) -> Member | None:
        """The drafter that a request of `token_ids` is opened on now, or None where none can take it.

        held_by: index of the member that holds the request, which keeps it while it answers
        reopened: whether another drafter had read the request before
        """
        members = self.joined
        if len(members) == 1 and not members[0].link.leaving:
            return members[0] if members[0].link.connected else None
        self.look_around()  # a target that was idle has not polled since
        size = len(token_ids)
        there = [m for m in members if m.link.connected and not m.abandoned and size <= m.max_length]
        if held_by is not None and members[held_by] in there:
            return members[held_by]
        there = [member for member in there if not member.link.leaving]
        for member in there:
            member.catch_up()
        in_time = [member for member in there if member.late_share <= MAX_LATE_SHARE]
        for member in there:
            if member not in in_time:
                member.late_share -= FORGIVEN * member.late_share  # what it was late for may be over
        there = in_time or there
        if reopened:
            there = [m for m in there if not m.reading or sum(m.reading.values()) + size <= MAX_REOPENED_TOKENS]
        if not there:
            return None
        chosen = self._by_prefix(token_ids, there)
        if chosen is None:
            chosen = min(self._random.sample(there, min(2, len(there))), key=lambda member: member.num_held)
        self._remember(token_ids, chosen)
        return chosen

    def _by_prefix(self, token_ids: Sequence[int] | np.ndarray, there: list[Member]) -> Member | None:
        index = self._prefixes.get(_prefix(token_ids))
        least = min(member.num_held for member in there)
        return next((m for m in there if m.index == index and m.num_held <= PREFIX_LOAD * least + 1), None)

    def _remember(self, token_ids: Sequence[int] | np.ndarray, member: Member) -> None:
        if len(token_ids) >= PREFIX_TOKENS:
            key = _prefix(token_ids)
            self._prefixes[key] = member.index
            self._prefixes.move_to_end(key)
            if len(self._prefixes) > MAX_PREFIXES:
                self._prefixes.popitem(last=False)


def _prefix(token_ids: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(token_ids[:PREFIX_TOKENS], np.int32).tobytes()
