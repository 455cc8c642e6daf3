"""How much of the drafter each of several targets gets: deficit round robin (Shreedhar and Varghese, 1995).

Branches are as many for each request, so that a step is shared by itself. What a target can flood are events, each of
which costs the drafter time before the next step, and prompts, whose tokens ride in the steps of all. A sound target
that is faster than the drafter's steps does not fall behind: what it has said beyond its ration is merged with what was
heard (`vllm_ssd.drafter.merging`), which costs little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_ssd.drafter.merging import merged
from vllm_ssd.link.protocol import Close, Open, Outcome

PROMPT_TOKENS = 512
"""Tokens of prompts that targets which have some open between two steps, together; one alone opens all at once."""
TOKEN_BYTES = 4
MAX_SAVED_POLLS = 8
"""A target that was silent may say at once what it could have said in so many polls."""


@dataclass(slots=True)
class Waiting:
    """A request whose Open waits for its turn, and what has become of it since."""

    opened: Open
    outcome: Outcome | None
    num_drafts: int

    @property
    def num_tokens(self) -> int:
        return len(self.opened.token_ids) // TOKEN_BYTES


@dataclass(slots=True)
class Ration:
    """Of one target. events_a_poll: what a sound one needs at most, on average."""

    events_a_poll: int
    _events: int = 0
    _tokens: float = 0.0
    waiting: dict[str, Waiting] = field(default_factory=dict)  # the longest waiting first

    @property
    def is_used_up(self) -> bool:
        """Whether the rest of what it says has to wait for a later poll."""
        return self._events <= 0

    def next_poll(self) -> None:
        """It may say more."""
        self._events = min(self._events + self.events_a_poll, MAX_SAVED_POLLS * self.events_a_poll)

    def spoke(self, num_events: int) -> None:
        """It has said so much, in one message perhaps more than it may."""
        self._events -= num_events

    def keep(self, event: Open | Outcome | Close, num_drafts: int, is_shared: bool) -> bool:
        """Whether an event waits; an Open does where there is somebody else, and with it what follows it."""
        request_id = event.request_id
        if isinstance(event, Open):
            self.waiting.pop(request_id, None)
            if is_shared:
                self.waiting[request_id] = Waiting(event, None, num_drafts)
            return is_shared
        waiting = self.waiting.get(request_id)
        if waiting is None:
            return False
        if isinstance(event, Close):
            del self.waiting[request_id]
            return False
        if event.epoch != waiting.opened.epoch:
            return False
        waiting.outcome = event if waiting.outcome is None else merged(waiting.outcome, event)
        waiting.num_drafts = num_drafts
        return True

    def grant(self, num_tokens: float) -> Iterable[Waiting]:
        """The requests whose turn has come with `num_tokens` more."""
        self._tokens += num_tokens
        while self.waiting:
            request_id, first = next(iter(self.waiting.items()))
            if first.num_tokens > self._tokens:
                return
            self._tokens -= first.num_tokens
            del self.waiting[request_id]
            yield first
        self._tokens = 0.0
