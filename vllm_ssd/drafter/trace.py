"""Traces of outcomes, for `vllm-ssd profile` and `scripts/simulate.py`, and of the drafter's timeline."""

from __future__ import annotations

import json
import time
from typing import Any

from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.link.protocol import Push
from vllm_ssd.link.timeline import TRACE_ENV, Timeline
from vllm_ssd.link.transport import Transport
from vllm_ssd.policy import FanOut

__all__ = ["TRACE_ENV", "TracedEngine", "TracedFanOut", "TracedTransport"]


class TracedFanOut(FanOut):
    """A fan-out that records the outcomes it learns from.

    One JSON line per outcome: [drafts, accept length, rank of t* from 0 or null, whether the drafts were a hit].
    """

    def __init__(self, path: str, *args) -> None:
        super().__init__(*args)
        self._file = open(path, "a", buffering=1)

    def observe(
        self, num_drafts: int, accept_length: int, rank: int | None, after_hit: bool, num_candidates: int | None = None
    ) -> None:
        """Record the outcome, then learn from it."""
        print(json.dumps([num_drafts, accept_length, rank, after_hit]), file=self._file)
        super().observe(num_drafts, accept_length, rank, after_hit, num_candidates)


class TracedEngine:
    """Wraps an engine and records its forwards and outcomes on the timeline."""

    def __init__(self, engine: DraftEngine, timeline: Timeline) -> None:
        self._engine = engine
        self._timeline = timeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def advance(self, request_id: str, epoch: int, length: int, *args: Any, **kwargs: Any) -> None:
        """See `DraftEngine.advance`."""
        started = time.monotonic_ns()
        self._engine.advance(request_id, epoch, length, *args, **kwargs)
        self._timeline.span("drafter", "outcome", started, time.monotonic_ns(), request=request_id, length=length)

    def speculate(self) -> Push | None:
        """See `DraftEngine.speculate`."""
        started, steps = time.monotonic_ns(), self._engine.num_steps
        push = self._engine.speculate()
        if self._engine.num_steps > steps:
            requests = self._engine.sequences.values()
            self._timeline.span(
                "drafter",
                "step",
                started,
                time.monotonic_ns(),
                requests=len(requests),
                branches=sum(len(sequence.rows) for sequence in requests),
            )
        return push


class TracedTransport:
    """Wraps a transport and records its waits and pushes on the timeline."""

    def __init__(self, transport: Transport, timeline: Timeline) -> None:
        self._transport = transport
        self._timeline = timeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def poll(self, timeout_s: float | None = 0.0) -> list[Any]:
        """See `Transport.poll`; the drafter only waits if it has no work."""
        if timeout_s is None:
            self._timeline.flush()  # the server may kill the drafter while it waits
        started = time.monotonic_ns()
        messages = self._transport.poll(timeout_s)
        if timeout_s is None or timeout_s > 0:
            self._timeline.span("drafter", "wait", started, time.monotonic_ns())
        return messages

    def send(self, message: Any) -> None:
        """See `Transport.send`."""
        started = time.monotonic_ns()
        self._transport.send(message)
        if isinstance(message, Push) and message.blocks:
            branches = sum(block.num_branches for block in message.blocks)
            self._timeline.span(
                "drafter", "push", started, time.monotonic_ns(), blocks=len(message.blocks), branches=branches
            )
