"""What the engine asks of the pages that hold its token trees."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np

from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch
from vllm_ssd.drafter.step_tokens import StepTokens


class Pages(Protocol):
    """KV pages of one spine a slot, and of the branches that start from it, by their rows in `Branches`.

    A spine's full pages may be shared with other requests. A branch reads its spine's full pages before its base and
    owns the pages from there on, all of them from its start. No request is evicted here: `num_free` tells the caller
    what it may ask for.

    Published pages are cached by a digest of what they contain and all that precedes it. They stay when their requests
    end, and count as free again then: the least recently used ones go when space is needed.

    page_size: slots of a page; capacity: pages, free or held
    """

    page_size: int
    capacity: int

    @property
    def num_free(self) -> int:
        """Pages that no spine or branch holds."""
        ...

    def missing(self, slot: int, num_tokens: int) -> int:
        """Pages that a spine lacks to hold `num_tokens`."""
        ...

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Give a spine the pages it lacks; as many must be free."""

    def adopt(self, slot: int, digests: Iterable[bytes]) -> int:
        """Add the cached pages of `digests` to a spine, up to one that is not found; how many they are."""
        ...

    def publish(self, slot: int, first: int, digests: SequenceOf[bytes]) -> object:
        """Let pages of a spine from its page `first` on be found by `digests`.

        They are full, were computed, and are not written again by this spine.
        """

    def forget_idle(self) -> None:
        """Drop the cached pages that no spine holds."""

    def needed(self, rows: np.ndarray) -> int:
        """Pages that `fork` takes for new branches in `rows`, all of one fork point."""
        ...

    def fork(self, rows: np.ndarray) -> None:
        """Give pages to new branches in `rows` [n], all of one fork point; as many as they need must be free.

        Slots of the spine that lie before the base in its page are copied, and with a just-in-time branch, whose base
        has its KV already, that of the base. The fork points of a round come in ascending order.
        """

    def commit(self, slot: int, rows: np.ndarray, winner: int = -1) -> None:
        """Free the branches in `rows`; a `winner` among them becomes the spine from the page of its base on."""

    def close(self, slot: int, rows: np.ndarray) -> None:
        """Free a spine and its branches."""

    def batch(self, tokens: StepTokens) -> ForwardBatch | TreeBatch:
        """The forward of `tokens`, before which everything asked for is carried out."""
        ...
