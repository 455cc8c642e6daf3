"""Merge the outcomes of several rounds into one, for a drafter that is slower than its target.

Only a request's current state matters: its tokens, and the drafts under verification. Without merging, the drafter
would draft for rounds that are already over.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from vllm_ssd.link.protocol import Close, Open, Outcome, Step

MAX_MERGED_STEPS = 8
"""Most steps that are merged per poll, enough for a target that runs about so many rounds between two polls."""

Event = Open | Outcome | Close
Place = tuple[list[Event | None], int]
"""Location of an outcome: the events of its step, and its index there."""


class MergedOutcome(Outcome, frozen=True):
    """Consecutive outcomes of a request as one; rounds: tokens emitted by each of them."""

    rounds: tuple[int, ...] = ()


def merged(first: Outcome, second: Outcome) -> MergedOutcome:
    """Merge two consecutive outcomes of a request."""
    rounds = first.rounds if isinstance(first, MergedOutcome) else (len(first.emitted),)
    return MergedOutcome(
        second.request_id,
        second.epoch,
        second.length,
        first.emitted + second.emitted,
        second.draft_token_ids,
        second.jit,
        (*rounds, len(second.emitted)),
    )


def merge_backlog(heard: list[Step], behind: deque[Any], max_events: int) -> tuple[list[Step], int]:
    """Merge waiting steps of a target into the steps `heard`, as long as most of their events can be merged.

    An outcome that continues an earlier one replaces it. Merged steps are removed from `behind`: at most
    MAX_MERGED_STEPS, each with at most `max_events` events.
    -> the steps; and their cost beyond `heard`: one per merged step plus one per event that could not be merged
    """
    steps: list[tuple[list[Event | None], int]] = [([*step.events], step.num_speculative_tokens) for step in heard]
    latest: dict[str, Place] = {}
    for events, _ in steps:
        _note(events, latest)
    num_heard = 0
    for _ in range(MAX_MERGED_STEPS):
        step = behind[0] if behind else None
        if not isinstance(step, Step) or len(step.events) > max_events:
            break
        followed = _followed(step, latest)
        num_new = followed.count(None)
        if 2 * num_new > len(followed):
            break
        behind.popleft()
        num_heard += 1 + num_new
        events = [event if at is None else _take(at, event) for event, at in zip(step.events, followed)]
        _note(events, latest)
        steps.append((events, step.num_speculative_tokens))
    left = [([event for event in events if event is not None], num_drafts) for events, num_drafts in steps]
    return [Step(events, num_drafts) for events, num_drafts in left if events], num_heard


def _note(events: list[Event | None], latest: dict[str, Place]) -> None:
    """Record the location of each request's latest outcome."""
    for index, event in enumerate(events):
        if isinstance(event, Outcome):
            latest[event.request_id] = events, index
        elif event is not None:
            latest.pop(event.request_id, None)


def _followed(step: Step, latest: dict[str, Place]) -> list[Place | None]:
    """The location of the outcome that each event continues, None if it continues none.

    Only the first event of each request in a step can continue an earlier outcome.
    """
    named: set[str] = set()
    places: list[Place | None] = []
    for event in step.events:
        place = latest.get(event.request_id) if isinstance(event, Outcome) else None
        if event.request_id in named or not (place and _follows(event, place)):
            place = None
        named.add(event.request_id)
        places.append(place)
    return places


def _follows(event: Event, place: Place) -> bool:
    first = place[0][place[1]]
    assert isinstance(first, Outcome) and isinstance(event, Outcome)
    return first.epoch == event.epoch and first.length + len(event.emitted) == event.length


def _take(place: Place, event: Event) -> MergedOutcome:
    """Remove the outcome at `place` and merge it with `event`, which continues it."""
    events, index = place
    first, events[index] = events[index], None
    assert isinstance(first, Outcome) and isinstance(event, Outcome)
    return merged(first, event)
