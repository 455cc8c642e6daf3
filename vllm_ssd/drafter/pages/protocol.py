"""The interface between the engine and the KV pages of its token trees."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np

from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch
from vllm_ssd.drafter.step_tokens import StepTokens


class Pages(Protocol):
    """KV pages of the spine in each slot, and of the branches that start from it, by their rows in `Branches`.

    A spine's full pages may be shared with other requests. A branch reads its spine's full pages before its base and
    owns all pages from there on, allocated when it starts. Callers check `num_free` first; nothing is evicted here.

    Published pages are cached by a digest of their content and everything before it. They survive their requests, and
    then count as free: the least recently used ones are dropped when space is needed.

    page_size: tokens per page; capacity: total number of pages
    """

    page_size: int
    capacity: int

    @property
    def num_free(self) -> int:
        """Pages that no spine or branch holds."""
        ...

    def missing(self, slot: int, num_tokens: int) -> int:
        """Number of pages that a spine lacks for `num_tokens` tokens."""
        ...

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Give a spine the pages that it lacks for `num_tokens` tokens; as many must be free."""

    def adopt(self, slot: int, digests: Iterable[bytes]) -> int:
        """Append the cached pages of the longest known prefix of `digests` to a spine; returns their number."""
        ...

    def publish(self, slot: int, first: int, digests: SequenceOf[bytes]) -> object:
        """Add pages of a spine, from its page `first` on, to the cache under `digests`.

        They must be full and computed, and the spine must not write them again.
        """

    def forget_idle(self) -> None:
        """Drop the cached pages that no spine holds."""

    def needed(self, rows: np.ndarray) -> int:
        """Pages that `fork` takes for new branches in `rows`, all of one fork point."""
        ...

    def fork(self, rows: np.ndarray) -> None:
        """Give pages to new branches in `rows` [n], all of one fork point; as many as `needed` must be free.

        The spine's KV slots before the base in the base's page are copied, and also the base's own slot for a
        just-in-time branch, whose base is computed already. A round's fork points must be forked in ascending order.
        """

    def commit(self, slot: int, rows: np.ndarray, winner: int = -1) -> None:
        """Free the branches in `rows`; the pages of `winner`, if given, replace the spine's from its base's page on."""

    def close(self, slot: int, rows: np.ndarray) -> None:
        """Free a spine and its branches."""

    def batch(self, tokens: StepTokens) -> ForwardBatch | TreeBatch:
        """Carry out all pending operations and build the forward of `tokens`."""
        ...
