"""A record of outcomes, for `vllm-ssd profile` and `scripts/simulate.py`."""

from __future__ import annotations

import json

from vllm_ssd.policy import FanOut

TRACE_ENV = "VLLM_SSD_TRACE"
"""Environment variable with the path that a drafter appends its outcomes to."""


class TracedFanOut(FanOut):
    """A fan-out that writes down what it learns from.

    One JSON line an outcome: [drafts, accept length, rank of t* from 0 or null, whether the drafts came from a branch].
    """

    def __init__(self, path: str, *args) -> None:
        super().__init__(*args)
        self._file = open(path, "a", buffering=1)

    def observe(
        self, num_drafts: int, accept_length: int, rank: int | None, after_hit: bool, num_candidates: int | None = None
    ) -> None:
        """Write the outcome down, then learn from it."""
        print(json.dumps([num_drafts, accept_length, rank, after_hit]), file=self._file)
        super().observe(num_drafts, accept_length, rank, after_hit, num_candidates)
