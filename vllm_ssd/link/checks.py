"""Whether what a drafter pushes may reach the target, by value.

Checked are shapes and ranges. Whether a draft was drawn from the q that comes with it, only the drafter can know.
"""

from __future__ import annotations

import numpy as np

from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import JIT_TOKEN, Push, SpeculationBlock

Q_EPSILON = 1e-3
"""How far over 1 rounding may bring the sum of a proposal's probabilities."""
BYTES_A_ROW = 256
"""Of a push, for what surrounds the arrays of one branch: the request id above all."""
BYTES_A_REQUEST = 64 << 10
"""Of a push, for evictions, and of a step, for a long request id and the tokens of its rounds."""

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
        blocks = push.blocks
        if not blocks:
            return None
        if len(blocks) > self._max_blocks:
            return f"{len(blocks)} blocks at once"
        return self._wrong_sizes(blocks) or self._wrong_values(blocks)

    def _wrong_sizes(self, blocks: list[SpeculationBlock]) -> str | None:
        for block in blocks:
            if not block.fits:
                return "a block whose arrays have different lengths"
            num_branches, num_bytes = block.num_branches, len(block.draft_token_ids)
            if num_branches > self._max_rows:
                return f"a block of {num_branches} branches"
            if block.offset + num_bytes // (4 * num_branches) > self._num_drafts:
                return f"drafts beyond num_speculative_tokens = {self._num_drafts}"
            if len(block.q_token_ids) > num_bytes * self._max_support:
                return f"a proposal of over {self._max_support} tokens"
        return None

    def _wrong_values(self, blocks: list[SpeculationBlock]) -> str | None:
        outcomes = _unsigned([block.outcomes for block in blocks])
        if outcomes[0::2].max() > self._num_drafts:
            return "an accept length out of range"
        bonus_token_ids = outcomes[1::2]
        if bonus_token_ids.max() >= self._vocab_size:
            wrong = bonus_token_ids >= self._vocab_size
            if (bonus_token_ids[wrong] != _JIT).any() or outcomes[0::2][wrong].any():
                return "a bonus token that is not in the target's vocabulary"
        if _unsigned([block.draft_token_ids for block in blocks]).max() >= self._vocab_size:
            return "a draft that is not in the target's vocabulary"
        by_support: dict[int, list[SpeculationBlock]] = {}
        for block in blocks:
            if block.q_token_ids:
                by_support.setdefault(len(block.q_token_ids) // len(block.draft_token_ids), []).append(block)
        for support, sampled in by_support.items():
            reason = self._wrong_proposals(sampled, support)
            if reason is not None:
                return reason
        return None

    def _wrong_proposals(self, blocks: list[SpeculationBlock], support: int) -> str | None:
        """As `reason`, for the proposals of blocks whose drafts have `support` ids each."""
        token_ids = _unsigned([block.q_token_ids for block in blocks]).reshape(-1, support)
        if np.maximum.reduce(token_ids, axis=None) >= self._vocab_size:
            return "a proposal over tokens that are not in the target's vocabulary"
        bits = _unsigned([block.q_probs for block in blocks]).reshape(-1, support)
        probs = bits.view(np.float32)
        high = np.maximum.reduce(bits, axis=None) > _ONE  # in bits, NaN is over 1 too
        if high and not ((probs >= 0) & (probs <= 1 + Q_EPSILON)).all():
            return "a probability that is not from 0 to 1"
        sums = probs @ self._ones[:support]
        if not (0 < sums.min() and sums.max() <= 1 + Q_EPSILON):
            return "probabilities that do not sum to 1"
        drafts = _unsigned([block.draft_token_ids for block in blocks])
        at = (token_ids == drafts[:, None]).argmax(1)  # of each row the first match, or 0 without one
        at += np.arange(0, token_ids.size, support)
        if (token_ids.take(at) != drafts).any() or not bits.take(at).all():
            return "a draft that its proposal does not hold"
        return None


def max_push_bytes(options: DrafterOptions) -> int:
    """The bytes that a sound drafter's largest push stays below."""
    row = BYTES_A_ROW + 8 + options.num_speculative_tokens * (4 + 8 * options.max_support)
    return (1 << 20) + options.max_num_seqs * (BYTES_A_REQUEST + (options.max_branches + 1) * row)


def max_step_bytes(max_model_len: int, max_num_seqs: int) -> int:
    """The bytes that a target's largest step stays below: all requests open anew, and some that came and went."""
    return (1 << 20) + 4 * max_num_seqs * (BYTES_A_REQUEST + 4 * max_model_len)


def _unsigned(arrays: list[bytes]) -> np.ndarray:
    """Arrays of 32-bit items, one after the other, as uint32: a negative id is a large one."""
    return np.frombuffer(arrays[0] if len(arrays) == 1 else b"".join(arrays), "<u4")
