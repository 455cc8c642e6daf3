"""What an actor is told of its drafter, and what it says of it."""

from __future__ import annotations

from typing import Any

import msgspec


class DrafterSpec(msgspec.Struct, frozen=True):
    """keys: of `SSDConfig`; resources: what Ray reserves, by its names; credential: PEM."""

    keys: dict[str, Any]
    max_num_seqs: int
    resources: dict[str, float]
    credential: str

    @property
    def on_cpu(self) -> bool:
        """Whether the drafter gets no GPU."""
        return not self.resources.get("GPU")


class Status(msgspec.Struct, frozen=True):
    """A drafter as its actor knows it; address: "" while it loads, or after it failed, for the reason in `problem`."""

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
        """In a word."""
        if self.address:
            return "leaving" if self.leaving else "ready"
        return "failed" if self.problem else "loading" if self.node else "waiting"
