"""The settings that an actor gets for its drafter, and the status that it reports."""

from __future__ import annotations

from typing import Any

import msgspec


class DrafterSpec(msgspec.Struct, frozen=True):
    """Settings of a drafter. keys: of `SSDConfig`; resources: Ray resources by name; credential: PEM."""

    keys: dict[str, Any]
    max_num_seqs: int
    resources: dict[str, float]
    credential: str

    @property
    def on_cpu(self) -> bool:
        """Whether the drafter gets no GPU."""
        return not self.resources.get("GPU")


class Status(msgspec.Struct, frozen=True):
    """An actor's view of its drafter.

    node: "" until Ray has placed it; address: "" while it loads, or after it failed; problem: why it failed
    """

    name: str
    node: str = ""
    pid: int = 0
    address: str = ""
    leaving: bool = False
    targets: int = 0
    requests: int = 0
    starts: int = 0
    problem: str = ""

    @property
    def state(self) -> str:
        """The state as a word: ready, leaving, failed, loading, or waiting for a place."""
        if self.address:
            return "leaving" if self.leaving else "ready"
        return "failed" if self.problem else "loading" if self.node else "waiting"
