"""A drafter link that records its traffic on the timeline, used only if `VLLM_SSD_TRACE` is set."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vllm_ssd.link.process import DrafterProcess
from vllm_ssd.link.protocol import Close, Open, Outcome, Push, SpeculationBlock, Step
from vllm_ssd.link.timeline import Timeline


@dataclass(slots=True)
class _Request:
    length: int = 0
    drafts: list[int] = field(default_factory=list)
    blocks: list[SpeculationBlock] = field(default_factory=list)  # for this length


class TracedDrafterProcess(DrafterProcess):
    """Records verifications, rounds with the origin of their drafts, pushes and waits on the timeline.

    On V1 a verification lasts from the report of a round until the next poll. On V2, where asynchronous scheduling
    keeps the device busy, and wherever the target waits on several drafters' descriptors, it lasts from one round's
    report to the next. Each drafter after the first has its own tracks.
    """

    def __init__(self, *args, timeline: Timeline, index: int = 0, **kwargs) -> None:
        self._timeline = timeline
        self._target, self._waits = (f"{track} {index}" if index else track for track in ("target", "waits"))
        self._requests: dict[str, _Request] = {}
        self._told_ns = self._known_ns = 0
        self._rows: set[str] = set()  # requests of the round under verification
        self._sleeps = False  # whether the target waits on the link's descriptor, and polls whenever it wakes
        super().__init__(*args, **kwargs)

    def poll(self, timeout_s: float = 0.0) -> list[Push]:
        """See `DrafterProcess.poll`; records waits and received blocks."""
        started = time.monotonic_ns()
        if not self._known_ns and self._told_ns:
            self._known_ns = started
        pushes = super().poll(timeout_s)
        if timeout_s > 0:
            self._timeline.span(self._waits, "wait", started, time.monotonic_ns(), ms=1e3 * timeout_s)
        for push in pushes:
            for block in push.blocks:
                request = self._requests.get(block.request_id)
                if request is not None and request.length == block.length:
                    request.blocks.append(block)
                depth = len(block.draft_token_ids) // 4 // max(block.num_branches, 1) + block.offset
                self._timeline.instant(
                    "pushes",
                    "block",
                    request=block.request_id,
                    length=block.length,
                    branches=block.num_branches,
                    depth=depth,
                )
        return pushes

    def descriptor(self) -> int | None:
        """See `DrafterProcess.descriptor`."""
        self._sleeps = True
        return super().descriptor()

    def send(self, step: Step) -> None:
        """See `DrafterProcess.send`; records the round that it reports."""
        outcomes = {event.request_id for event in step.events if isinstance(event, Outcome) and event.emitted}
        started = time.monotonic_ns()
        if outcomes & self._rows:
            known = started if self._sleeps or not self._known_ns else self._known_ns
            self._timeline.span(self._target, "verify", self._told_ns, known, rows=len(self._rows))
            if known < started:
                self._timeline.span(self._target, "hand over", known, started)
        for event in step.events:
            self._note(event)
        super().send(step)
        if outcomes or not self._rows:
            self._rows = {event.request_id for event in step.events if not isinstance(event, Close)}
        self._told_ns, self._known_ns = time.monotonic_ns(), 0

    def _note(self, event: Open | Outcome | Close) -> None:
        if isinstance(event, Close):
            self._requests.pop(event.request_id, None)
            self._timeline.instant("rounds", "close", request=event.request_id)
        elif isinstance(event, Open):
            self._requests[event.request_id] = _Request(len(event.token_ids) // 4)
            self._timeline.instant(
                "rounds", "open", request=event.request_id, length=self._requests[event.request_id].length
            )
        elif (request := self._requests.get(event.request_id)) is not None:
            self._note_round(request, event)

    def _note_round(self, request: _Request, event: Outcome) -> None:
        k, drafts = max(len(event.emitted) - 1, 0), event.draft_token_ids
        fate = _fate(request, event)
        self._timeline.instant(
            "rounds",
            "round",
            request=event.request_id,
            length=event.length,
            verified=len(request.drafts),
            accepted=min(k, len(request.drafts)) if event.emitted else 0,
            emitted=len(event.emitted),
            fate=fate,
            drafts=len(drafts),
            branches=sum(block.num_branches for block in request.blocks if not block.offset),
        )
        if event.length != request.length:
            request.blocks = []
        request.length, request.drafts = event.length, drafts


def _fate(request: _Request, event: Outcome) -> str:
    """Origin of the next drafts: "hit" (a branch) or "other" (n-gram or just in time); without any "miss" or "late"."""
    drafts, emitted = event.draft_token_ids, event.emitted
    if drafts and emitted:
        for block in request.blocks:
            branch = block.find(len(emitted) - 1, emitted[-1]) if not block.offset else -1
            if branch >= 0 and block.drafts(branch)[:1] == drafts[:1]:
                return "hit"
    if drafts:
        return "other"
    return "miss" if request.blocks else "late"
