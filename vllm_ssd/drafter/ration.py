"""Share the drafter fairly between targets: deficit round robin (Shreedhar and Varghese, 1995).

Steps are shared fairly already, as every request has equally many branches. But a target can flood the drafter with
events, each of which delays the next step, and with prompts, whose tokens make everybody's steps longer. A correct
target that is faster than the drafter does not fall behind: events beyond its ration are merged at little cost
(`vllm_ssd.drafter.merging`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_ssd.drafter.merging import merged
from vllm_ssd.link.protocol import Close, Open, Outcome

PROMPT_TOKENS = 512
"""Prompt tokens that all targets together may open per poll; a target without competition opens all at once."""
TOKEN_BYTES = 4
MAX_SAVED_POLLS = 8
"""Polls whose unused ration a silent target can save up."""


@dataclass(slots=True)
class Waiting:
    """A request whose Open waits for its turn, and the merged outcomes that followed it."""

    opened: Open
    outcome: Outcome | None
    num_drafts: int

    @property
    def num_tokens(self) -> int:
        return len(self.opened.token_ids) // TOKEN_BYTES


@dataclass(slots=True)
class Ration:
    """The ration of one target. events_a_poll: average number of events per poll that it may send."""

    events_a_poll: int
    _events: int = 0
    _tokens: float = 0.0
    waiting: dict[str, Waiting] = field(default_factory=dict)  # longest waiting first

    @property
    def is_used_up(self) -> bool:
        """Whether further messages have to wait for a later poll."""
        return self._events <= 0

    def next_poll(self) -> None:
        """Replenish the ration for another poll."""
        self._events = min(self._events + self.events_a_poll, MAX_SAVED_POLLS * self.events_a_poll)

    def spoke(self, num_events: int) -> None:
        """Charge `num_events`; a single message may overdraw the ration."""
        self._events -= num_events

    def keep(self, event: Open | Outcome | Close, num_drafts: int, is_shared: bool) -> bool:
        """Queue an event if it has to wait, and return whether it does.

        An Open waits if the drafter is shared with other targets; later outcomes of a waiting request wait with it.
        """
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
        """Add `num_tokens` to the ration and yield the waiting requests that it now covers."""
        self._tokens += num_tokens
        while self.waiting:
            request_id, first = next(iter(self.waiting.items()))
            if first.num_tokens > self._tokens:
                return
            self._tokens -= first.num_tokens
            del self.waiting[request_id]
            yield first
        self._tokens = 0.0
