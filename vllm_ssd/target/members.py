"""Assign requests to the drafters of a fleet."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_ssd.link.fleet import Fleet, Link
from vllm_ssd.link.protocol import Close, Open, Outcome, Step

MAX_REOPENED_TOKENS = 8192
"""Most tokens of reopened requests that a drafter prefills at a time, unless a single request has more."""
LATE_ROUNDS = 128
"""Number of outcomes over which a drafter's share of late blocks is averaged."""
MAX_LATE_SHARE = 0.5
"""A drafter with a larger late share gets no new requests, except one to try now and then."""
FORGIVEN = 1 / 16
"""Share of its late share that a late drafter is forgiven with each request that it misses out on."""
PREFIX_TOKENS = 64
"""Requests that share so many first tokens go to the same drafter, which may have them in its prefix cache."""
MAX_PREFIXES = 4096
PREFIX_LOAD = 1.25
"""A drafter that knows the prefix may hold this many times the requests of the least busy one, plus one."""


@dataclass(slots=True, eq=False)
class Member:
    """The target's view of one drafter of the fleet."""

    index: int
    link: Link
    reserve: int  # tokens of its context that are reserved for drafts
    generation: int = 0  # generation of the drafter process that the fields below refer to
    events: list[Open | Outcome | Close] = field(default_factory=list)  # not sent yet
    num_held: int = 0
    reading: dict[str, int] = field(default_factory=dict)  # tokens of opened requests without any push so far
    awaiting_push: bool = False  # a wait for it was in vain, and it has pushed nothing since
    was_told: bool = False  # it was sent an outcome in this round and has pushed nothing since
    silent_rounds: int = 0  # consecutive rounds in which `was_told` stayed true
    abandoned: bool = False  # it is gone or silent, and another drafter is available
    late_share: float = 0.0

    @property
    def max_length(self) -> int:
        """Most committed tokens of a request on this drafter."""
        return self.link.max_model_len - self.reserve

    def catch_up(self) -> None:
        """Reset the state if the drafter process has been replaced."""
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
        """Send the queued events, unless the drafter process they were meant for has been replaced."""
        if self.events:
            events, self.events = self.events, []
            if self.generation == self.link.generation:
                self.link.send(Step(events, num_drafts))

    def looked_up(self, late: bool) -> None:
        """Update the late share by one outcome; late: its block had not arrived."""
        self.late_share += (late - self.late_share) / LATE_ROUNDS


class Members:
    """The drafters of a fleet, which may grow; chooses the drafter for each request."""

    def __init__(self, fleet: Fleet, reserve: int) -> None:
        self._fleet = fleet
        self._reserve = reserve
        self.joined: list[Member] = []
        """Members by index; a plain attribute because the hot path reads it several times per request and round."""
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
        """Most committed tokens of a request on any drafter, including disconnected ones, which may come back."""
        self._welcome()  # drafters may have joined since an idle target polled
        return max((member.max_length for member in self.joined), default=0)

    def _welcome(self) -> None:
        for index in range(len(self.joined), len(self._fleet)):
            self.joined.append(Member(index, self._fleet.links[index], self._reserve))

    def look_around(self) -> None:
        """Abandon drafters that are gone or silent if another one is available; called after polls and by `choose`."""
        self._welcome()
        if len(self.joined) > 1:
            sound = [member.link.connected and not member.link.suspect for member in self.joined]
            for member, is_sound in zip(self.joined, sound):
                if member.abandoned and is_sound:
                    member.late_share = 0.0  # it was late because it was gone
                member.abandoned = not is_sound and any(sound)

    def choose(self, token_ids: Sequence[int] | np.ndarray, held_by: int | None, reopened: bool) -> Member | None:
        """Choose the drafter to open a request with `token_ids` on; None if no drafter can take it now.

        held_by: index of the member that holds the request, which keeps it as long as it is available
        reopened: whether the request was on a drafter before
        """
        members = self.joined
        if len(members) == 1 and not members[0].link.leaving:
            return members[0] if members[0].link.connected else None
        self.look_around()  # drafters may have died since an idle target polled
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
                member.late_share -= FORGIVEN * member.late_share  # the reason may have passed
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
