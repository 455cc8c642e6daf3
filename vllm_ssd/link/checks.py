"""Whether what a drafter pushes may reach the target, by value.

Checked are shapes and ranges, and that the q which comes with a draft gives it a probability. Whether the draft was
drawn from it, only the drafter can know.
"""

from __future__ import annotations

import functools
import struct

import numpy as np

from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import JIT_TOKEN, Push

Q_EPSILON = 1e-3
"""How far over 1 rounding may bring the sum of a proposal's probabilities."""
BYTES_A_ROW = 256
"""Of a push, for what surrounds the arrays of one branch: the request id above all."""
BYTES_A_REQUEST = 64 << 10
"""Of a push, for evictions, and of a step, for a long request id, its `Bias` and the tokens of its rounds."""

GROUP_BYTES = 256 << 10
"""Of the token ids of proposals that are checked at once: calls cost more than bytes for few of them, and what does not
fit into a core's cache costs more than calls."""
SMALL_BYTES = 4096
"""Of the ids of a push's blocks that are looked through without numpy: its calls cost more where caches are cold."""

_UINT32, _FLOAT32 = np.dtype("<u4"), np.dtype("<f4")
_largest = np.maximum.reduce
_JIT = JIT_TOKEN % 2**32
_ONE = int(np.float32(1 + Q_EPSILON).view(np.uint32))


class PushChecker:
    """Finds what is wrong with a push.

    vocab_size: the target's, V
    num_drafts: K, the most drafts a round may carry
    max_branches: most branches of a request, besides the just-in-time one
    max_support: most token ids in the proposal of one draft, M
    max_num_seqs: most requests at a time
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
        """The checker of a drafter that was started with `options`."""
        return cls(
            vocab_size=vocab_size,
            num_drafts=options.num_speculative_tokens,
            max_branches=options.max_branches,
            max_support=options.max_support,
            max_num_seqs=options.max_num_seqs,
        )

    def reason(self, push: Push) -> str | None:
        """What is wrong with `push`, to follow "sent "; None when it may be used."""
        stats = push.stats
        if stats is not None and (stats.pages_free > stats.pages_total or not stats.build_ms < float("inf")):
            return "impossible statistics"
        if len(push.blocks) > self._max_blocks:
            return f"{len(push.blocks)} blocks at once"
        return self._wrong_sizes(push) or (self._wrong_values(push) if push.blocks else None)

    def _wrong_sizes(self, push: Push) -> str | None:
        blocks = push.blocks
        if len(blocks) > 1:  # most have the sizes of another
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
        """As `reason`, for outcomes and the drafts of greedy blocks, flat."""
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
        """As `_wrong_ids` for few of them; False says nothing, nor of `JIT_TOKEN`.

        All ids are one number, to each of which is added what brings the first that is too large to 2^31: the top bit
        of each says whether it is in range, or was negative. Where none was, no sum has carried into the next id.
        """
        over_outcomes, over_drafts, top_bits = _lanes(
            self._num_drafts, self._vocab_size, len(outcomes) // 8, len(greedy) // 4
        )
        pairs, drafts = int.from_bytes(outcomes, "little"), int.from_bytes(greedy, "little")
        return not (pairs | pairs + over_outcomes | drafts | drafts + over_drafts) & top_bits

    def _wrong_proposals(self, push: Push) -> str | None:
        """As `reason`, for the proposals of a push that has some."""
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
        """As `reason`, for proposals of `support` ids each, their draft first; the probabilities' bits."""
        if _largest(token_ids) >= self._vocab_size:
            return "a proposal over tokens that are not in the target's vocabulary"
        probs = bits.view(_FLOAT32)
        # In bits NaN and whatever is negative are over 1, too.
        if _largest(bits) > _ONE and not ((probs >= 0) & (probs <= 1 + Q_EPSILON)).all():
            return "a probability that is not from 0 to 1"
        if _largest(probs.reshape(-1, support).dot(self._ones[:support])) > 1 + Q_EPSILON:
            return "probabilities that sum to more than 1"
        if np.count_nonzero(probs[::support]) * support < len(probs):
            return "a draft that its proposal gives no probability"
        return None


def max_push_bytes(options: DrafterOptions) -> int:
    """The bytes that a sound drafter's largest push stays below."""
    row = BYTES_A_ROW + 8 + options.num_speculative_tokens * (4 + 8 * options.max_support)
    return (1 << 20) + options.max_num_seqs * (BYTES_A_REQUEST + (options.max_branches + 1) * row)


def max_step_bytes(max_model_len: int, max_num_seqs: int) -> int:
    """The bytes that a target's largest step stays below: all requests open anew, and some that came and went."""
    return (1 << 20) + 4 * max_num_seqs * (BYTES_A_REQUEST + 4 * max_model_len)


@functools.lru_cache(maxsize=16)
def _lanes(num_drafts: int, vocab_size: int, num_outcomes: int, num_ids: int) -> tuple[int, int, int]:
    """What is added to `num_outcomes` pairs and to `num_ids` drafts of 32 bits an id, and the top bits of all."""
    limits = struct.pack("<2I", 2**31 - 1 - num_drafts, 2**31 - vocab_size)
    over_outcomes, over_drafts, top_bits = limits * num_outcomes, limits[4:] * num_ids, b"\0\0\0\x80"
    return (
        int.from_bytes(over_outcomes, "little"),
        int.from_bytes(over_drafts, "little"),
        int.from_bytes(top_bits * max(2 * num_outcomes, num_ids), "little"),
    )


def _unsigned(array: bytes) -> np.ndarray:
    """Items of 32 bits as uint32: a negative id is a large one."""
    return np.frombuffer(array, _UINT32)


def _joined(arrays: list[bytes]) -> bytes:
    return arrays[0] if len(arrays) == 1 else b"".join(arrays)
