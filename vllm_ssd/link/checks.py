"""Whether what a drafter pushes may reach the target, by value.

Checked are shapes and ranges, and that the q which comes with a draft gives it a probability. Whether the draft was
drawn from it, only the drafter can know.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import JIT_TOKEN, Push, SpeculationBlock

Q_EPSILON = 1e-3
"""How far over 1 rounding may bring the sum of a proposal's probabilities."""
BYTES_A_ROW = 256
"""Of a push, for what surrounds the arrays of one branch: the request id above all."""
BYTES_A_REQUEST = 64 << 10
"""Of a push, for evictions, and of a step, for a long request id and the tokens of its rounds."""

GROUP_BYTES = 64 << 10
"""Of the token ids of proposals that are checked at once."""

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
        if _largest(outcomes[0::2]) > self._num_drafts:
            return "an accept length out of range"
        bonus_token_ids = outcomes[1::2]
        if _largest(bonus_token_ids) >= self._vocab_size:
            wrong = bonus_token_ids >= self._vocab_size
            if (bonus_token_ids[wrong] != _JIT).any() or outcomes[0::2][wrong].any():
                return "a bonus token that is not in the target's vocabulary"
        greedy = [block.draft_token_ids for block in blocks if not block.q_token_ids]
        if greedy and _largest(_unsigned(greedy)) >= self._vocab_size:
            return "a draft that is not in the target's vocabulary"
        for support, sampled in _groups(blocks) if len(greedy) < len(blocks) else ():
            reason = self._wrong_proposals(sampled, support)
            if reason is not None:
                return reason
        return None

    def _wrong_proposals(self, blocks: list[SpeculationBlock], support: int) -> str | None:
        """As `reason`, for drafts whose proposals have `support` ids each."""
        token_ids = _unsigned([block.q_token_ids for block in blocks])
        if token_ids[::support].tobytes() != _joined([block.draft_token_ids for block in blocks]):
            return "a draft that is not the first of its proposal"
        if _largest(token_ids) >= self._vocab_size:
            return "a proposal over tokens that are not in the target's vocabulary"
        bits = _unsigned([block.q_probs for block in blocks])
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


def _unsigned(arrays: list[bytes]) -> np.ndarray:
    """Arrays of 32-bit items, one after the other, as uint32: a negative id is a large one."""
    return np.frombuffer(_joined(arrays), _UINT32)


def _joined(arrays: list[bytes]) -> bytes:
    return arrays[0] if len(arrays) == 1 else b"".join(arrays)


def _groups(blocks: list[SpeculationBlock]) -> Iterator[tuple[int, list[SpeculationBlock]]]:
    """The blocks with proposals, in groups that are checked at once, with the ids of each proposal in them.

    Calls cost more than bytes for small blocks; what does not fit into a core's cache costs more than calls.
    """
    group: list[SpeculationBlock] = []
    group_support = group_bytes = 0
    for block in blocks:
        num_bytes = len(block.q_token_ids)
        if not num_bytes:
            continue
        support = num_bytes // len(block.draft_token_ids)
        if group and (support != group_support or group_bytes + num_bytes > GROUP_BYTES):
            yield group_support, group
            group, group_bytes = [], 0
        group.append(block)
        group_support, group_bytes = support, group_bytes + num_bytes
    if group:
        yield group_support, group
