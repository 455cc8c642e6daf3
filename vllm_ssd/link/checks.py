"""Validation of a drafter's pushes by value, before the target uses them.

Checks shapes and ranges, and that each draft has a nonzero probability in its proposal q. Whether the draft was really
drawn from q cannot be checked.
"""

from __future__ import annotations

import functools
import struct

import numpy as np

from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import JIT_TOKEN, Push

Q_EPSILON = 1e-3
"""Tolerance for rounding in the sum of a proposal's probabilities."""
BYTES_A_ROW = 256
"""Allowance per branch of a push for everything but its arrays, mainly the request id."""
BYTES_A_REQUEST = 64 << 10
"""Allowance per request: in a push for evictions; in a step for a long request id, `Bias` and its rounds' tokens."""

GROUP_BYTES = 256 << 10
"""Bytes of proposals' token ids that are checked at once: enough to amortise numpy's calls, and few enough to stay in a
core's cache."""
SMALL_BYTES = 4096
"""Up to this many bytes, ids are checked without numpy, whose calls cost more while caches are cold."""

_UINT32, _FLOAT32 = np.dtype("<u4"), np.dtype("<f4")
_largest = np.maximum.reduce
_JIT = JIT_TOKEN % 2**32
_ONE = int(np.float32(1 + Q_EPSILON).view(np.uint32))


class PushChecker:
    """Validates pushes.

    vocab_size: V, the target's vocabulary size
    num_drafts: K, the most drafts per round
    max_branches: most branches per request, excluding the just-in-time branch
    max_support: M, the most token ids per proposal
    max_num_seqs: most concurrent requests
    """

    def __init__(
        self, *, vocab_size: int, num_drafts: int, max_branches: int, max_support: int, max_num_seqs: int
    ) -> None:
        self._vocab_size = vocab_size
        self._num_drafts = num_drafts
        self._max_rows = max_branches + 1
        self._max_support = min(max_support, vocab_size)
        self._max_blocks = max_num_seqs * self._max_rows
        self._ones = np.ones(self._max_support, np.float32)

    @classmethod
    def of(cls, options: DrafterOptions, vocab_size: int) -> PushChecker:
        """The checker for a drafter that was started with `options`."""
        return cls(
            vocab_size=vocab_size,
            num_drafts=options.num_speculative_tokens,
            max_branches=options.max_branches,
            max_support=options.max_support,
            max_num_seqs=options.max_num_seqs,
        )

    def reason(self, push: Push) -> str | None:
        """What is wrong with `push`, as the object of "sent"; None if it is valid."""
        stats = push.stats
        if stats is not None and (stats.pages_free > stats.pages_total or not stats.build_ms < float("inf")):
            return "impossible statistics"
        if len(push.blocks) > self._max_blocks:
            return f"{len(push.blocks)} blocks at once"
        return self._wrong_sizes(push) or (self._wrong_values(push) if push.blocks else None)

    def _wrong_sizes(self, push: Push) -> str | None:
        blocks = push.blocks
        if len(blocks) > 1:  # most blocks have the same sizes: check each combination once
            sizes = [len(block.outcomes) for block in blocks]
            drafts = [len(block.draft_token_ids) for block in blocks]
            offsets = [block.offset for block in blocks]
            if sizes.count(sizes[0]) == drafts.count(drafts[0]) == offsets.count(offsets[0]) == len(blocks):
                blocks = blocks[:1]
            else:
                blocks = list(dict(zip(zip(sizes, drafts, offsets), blocks)).values())
        for block in blocks:
            if not block.fits:
                return "a block whose arrays have different lengths"
            num_branches, num_bytes = block.num_branches, len(block.draft_token_ids)
            if num_branches > self._max_rows:
                return f"a block of {num_branches} branches"
            if block.offset + num_bytes // (4 * num_branches) > self._num_drafts:
                return f"drafts beyond num_speculative_tokens = {self._num_drafts}"
        if push.support > self._max_support:
            return f"a proposal of over {self._max_support} tokens"
        num_bytes = sum([len(block.draft_token_ids) for block in push.blocks if block.sampled])
        size = num_bytes * push.support
        if (num_bytes and not size) or len(push.q_token_ids) != size or len(push.q_probs) != size:
            return "proposals that are more or fewer than the drafts"
        return None

    def _wrong_values(self, push: Push) -> str | None:
        blocks = push.blocks
        outcomes = _joined([block.outcomes for block in blocks])
        greedy = _joined([block.draft_token_ids for block in blocks if not block.sampled])
        if len(outcomes) + len(greedy) > SMALL_BYTES or not self._are_in_range(outcomes, greedy):
            reason = self._wrong_ids(_unsigned(outcomes), _unsigned(greedy))
            if reason is not None:
                return reason
        return self._wrong_proposals(push) if push.q_probs else None

    def _wrong_ids(self, outcomes: np.ndarray, greedy: np.ndarray) -> str | None:
        """`reason` for the flat ids of outcomes and of greedy blocks' drafts."""
        if _largest(outcomes[0::2]) > self._num_drafts:
            return "an accept length out of range"
        bonus_token_ids = outcomes[1::2]
        if _largest(bonus_token_ids) >= self._vocab_size:
            wrong = bonus_token_ids >= self._vocab_size
            if (bonus_token_ids[wrong] != _JIT).any() or outcomes[0::2][wrong].any():
                return "a bonus token that is not in the target's vocabulary"
        if len(greedy) and _largest(greedy) >= self._vocab_size:
            return "a draft that is not in the target's vocabulary"
        return None

    def _are_in_range(self, outcomes: bytes, greedy: bytes) -> bool:
        """Fast version of `_wrong_ids` for few ids: True if all are in range.

        False is inconclusive; `JIT_TOKEN` always leads to it. All ids are treated as one large integer. Adding 2^31
        minus the limit to each id sets its top bit if it is too large, and a negative id has its top bit set already.
        Sums carry into the next id only if an id was negative, in which case the result is False anyway.
        """
        over_outcomes, over_drafts, top_bits = _lanes(
            self._num_drafts, self._vocab_size, len(outcomes) // 8, len(greedy) // 4
        )
        pairs, drafts = int.from_bytes(outcomes, "little"), int.from_bytes(greedy, "little")
        return not (pairs | pairs + over_outcomes | drafts | drafts + over_drafts) & top_bits

    def _wrong_proposals(self, push: Push) -> str | None:
        """`reason` for the proposals of a push that has some."""
        token_ids, bits, support = _unsigned(push.q_token_ids), _unsigned(push.q_probs), push.support
        drafts = _joined([block.draft_token_ids for block in push.blocks if block.sampled])
        if token_ids[::support].tobytes() != drafts:
            return "a draft that is not the first of its proposal"
        size = max(GROUP_BYTES // (4 * support), 1) * support
        for start in range(0, len(bits), size):
            reason = self._wrong_distributions(token_ids[start : start + size], bits[start : start + size], support)
            if reason is not None:
                return reason
        return None

    def _wrong_distributions(self, token_ids: np.ndarray, bits: np.ndarray, support: int) -> str | None:
        """`reason` for proposals of `support` ids each, the draft first; bits: probabilities as uint32."""
        if _largest(token_ids) >= self._vocab_size:
            return "a proposal over tokens that are not in the target's vocabulary"
        probs = bits.view(_FLOAT32)
        # As uint32, NaN and negative floats compare greater than 1, too.
        if _largest(bits) > _ONE and not ((probs >= 0) & (probs <= 1 + Q_EPSILON)).all():
            return "a probability that is not from 0 to 1"
        if _largest(probs.reshape(-1, support).dot(self._ones[:support])) > 1 + Q_EPSILON:
            return "probabilities that sum to more than 1"
        if np.count_nonzero(probs[::support]) * support < len(probs):
            return "a draft that its proposal gives no probability"
        return None


def max_push_bytes(options: DrafterOptions) -> int:
    """Upper bound on the size of a correct drafter's pushes."""
    row = BYTES_A_ROW + 8 + options.num_speculative_tokens * (4 + 8 * options.max_support)
    return (1 << 20) + options.max_num_seqs * (BYTES_A_REQUEST + (options.max_branches + 1) * row)


def max_step_bytes(max_model_len: int, max_num_seqs: int) -> int:
    """Upper bound on the size of a target's steps: all requests reopened, plus some that came and went."""
    return (1 << 20) + 4 * max_num_seqs * (BYTES_A_REQUEST + 4 * max_model_len)


@functools.lru_cache(maxsize=16)
def _lanes(num_drafts: int, vocab_size: int, num_outcomes: int, num_ids: int) -> tuple[int, int, int]:
    """The addends for `num_outcomes` pairs and for `num_ids` drafts, 32 bits per id, and the mask of their top bits."""
    limits = struct.pack("<2I", 2**31 - 1 - num_drafts, 2**31 - vocab_size)
    over_outcomes, over_drafts, top_bits = limits * num_outcomes, limits[4:] * num_ids, b"\0\0\0\x80"
    return (
        int.from_bytes(over_outcomes, "little"),
        int.from_bytes(over_drafts, "little"),
        int.from_bytes(top_bits * max(2 * num_outcomes, num_ids), "little"),
    )


def _unsigned(array: bytes) -> np.ndarray:
    """View 32-bit items as uint32, in which negative ids are large."""
    return np.frombuffer(array, _UINT32)


def _joined(arrays: list[bytes]) -> bytes:
    return arrays[0] if len(arrays) == 1 else b"".join(arrays)
