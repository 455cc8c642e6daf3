"""Outcomes of several rounds as one, for a drafter that is slower than its target.

What counts is where a request is now: its tokens, and the drafts that are being verified. A drafter that heard of each
round by itself would draft for rounds that are over.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from vllm_ssd.link.protocol import Close, Open, Outcome, Step

MAX_MERGED_STEPS = 8
"""Steps that are merged in one poll: with about so many rounds between two polls a target does not fall behind."""

Event = Open | Outcome | Close
Place = tuple[list[Event | None], int]
"""Where an outcome is: the events of its step, and its index."""


class MergedOutcome(Outcome, frozen=True):
    """Outcomes of a request that follow each other; `rounds` is how many tokens each of them emitted."""

    rounds: tuple[int, ...] = ()


def merged(first: Outcome, second: Outcome) -> MergedOutcome:
    """Two outcomes of one request, of which the second follows the first, as one."""
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
    """The steps `heard` of a target, and those that wait `behind` while most of their events can be merged with them.

    An outcome that follows another one takes its place. What is merged leaves `behind`: MAX_MERGED_STEPS at most, each
    of `max_events` at most.
    -> the steps; and what was heard beyond `heard`: one for each step, and one for each event that was not merged.
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
    """Write down where the last outcomes are."""
    for index, event in enumerate(events):
        if isinstance(event, Outcome):
            latest[event.request_id] = events, index
        elif event is not None:
            latest.pop(event.request_id, None)


def _followed(step: Step, latest: dict[str, Place]) -> list[Place | None]:
    """Where the outcomes are that the events of a step follow; of the events of one request only the first can."""
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
    """The outcome at `place`, which is gone from there, and the one that follows it."""
    events, index = place
    first, events[index] = events[index], None
    assert isinstance(first, Outcome) and isinstance(event, Outcome)
    return merged(first, event)
