"""What the drafter keeps of one request."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from vllm_ssd.link.protocol import common_prefix

NO_ROWS = np.empty(0, np.int64)


@dataclass(slots=True)
class Sequence:
    """One request: its spine, and the branches that start from it.

    awaited: drafts that the target waits for in this round, just in time; 0 once it has named those that it took, None
    in a round that nobody waited in.
    """

    request_id: str
    epoch: int
    slot: int
    temperature: float
    tokens: list[int]
    length: int  # committed tokens; tokens[length:] are the drafts under verification
    computed: int = 0  # leading tokens whose KV is in the pages
    candidates: dict[int, np.ndarray] = field(default_factory=dict)  # after tokens[i], for i >= length - 1
    rows: np.ndarray = field(default_factory=lambda: NO_ROWS)
    num_forks: int = 0  # fork points whose branches were started
    fan_out: SequenceOf[int] = ()
    num_drafts: int = 0
    after_hit: bool = False
    awaited: int | None = None
    decided_at: float = 0.0  # when its last outcome came

    @property
    def is_computed(self) -> bool:
        """Whether the whole spine has its KV."""
        return self.computed == len(self.tokens)


def most_shared(sequence: Sequence, others: Iterable[Sequence], page_size: int) -> tuple[Sequence | None, int]:
    """Which of `others` has computed most full pages of a prompt, its last token left out, and how many they are."""
    best, best_pages = None, 0
    for other in others:
        usable = min(other.computed, other.length, sequence.length - 1)
        if usable // page_size > best_pages:
            pages = common_prefix(sequence.tokens[:usable], other.tokens[:usable]) // page_size
            if pages > best_pages:
                best, best_pages = other, pages
    return best, best_pages
