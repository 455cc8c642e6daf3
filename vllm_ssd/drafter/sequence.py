"""What the drafter keeps of one request."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

NO_ROWS = np.empty(0, np.int64)


@dataclass(slots=True)
class Sequence:
    """One request: its spine, the pages that hold it, and the branches that start from it."""

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
    jit: int = 0
    after_hit: bool = False
    waited: bool = False  # the round now under verification was held up for just-in-time drafts
    decided_at: float = 0.0  # when its last outcome came

    @property
    def is_computed(self) -> bool:
        """Whether the whole spine has its KV."""
        return self.computed == len(self.tokens)
