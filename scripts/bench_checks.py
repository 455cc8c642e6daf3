"""Time the check by value of what a drafter pushes: 24 branches of 5 drafts, greedy and sampled, alone and in company.

python scripts/bench_checks.py

Prints microseconds a block, the best of many short runs on one core.
"""

from __future__ import annotations

import timeit

import numpy as np

from vllm_ssd.link.checks import PushChecker
from vllm_ssd.link.protocol import Push, SpeculationBlock, pack_ids

NUM_DRAFTS, CANDIDATES, SUPPORT, VOCAB_SIZE = 5, 4, 64, 152_064
BATCH_SIZES = (1, 4, 16)
CALLS, RUNS = 20, 600


def sound_push(rng: np.random.Generator, num_blocks: int, *, sampled: bool) -> Push:
    """Blocks of all outcomes' branches, one a request."""
    accept_lengths = np.repeat(np.arange(NUM_DRAFTS + 1), CANDIDATES)
    num_drafts = num_blocks * len(accept_lengths) * NUM_DRAFTS
    token_ids = np.stack([rng.choice(VOCAB_SIZE, SUPPORT, replace=False) for _ in range(num_drafts)])
    probs = rng.random((num_drafts, SUPPORT), np.float32)
    probs /= probs.sum(axis=1, keepdims=True)
    drafts = token_ids[:, 0]
    blocks = []
    for i, of_block in enumerate(drafts.reshape(num_blocks, -1)):
        outcomes = np.stack([accept_lengths, rng.integers(0, VOCAB_SIZE, len(accept_lengths))], axis=1)
        blocks.append(SpeculationBlock(str(i), 0, 10, 0, pack_ids(outcomes), pack_ids(of_block), sampled))
    return Push(blocks, [], None, SUPPORT, pack_ids(token_ids), probs.tobytes()) if sampled else Push(blocks, [], None)


def main() -> None:
    rng = np.random.default_rng(0)
    checker = PushChecker(
        vocab_size=VOCAB_SIZE,
        num_drafts=NUM_DRAFTS,
        max_branches=CANDIDATES * (NUM_DRAFTS + 1),
        max_support=SUPPORT,
        max_num_seqs=max(BATCH_SIZES),
    )
    for sampled in (False, True):
        for batch_size in BATCH_SIZES:
            push = sound_push(rng, batch_size, sampled=sampled)
            assert checker.reason(push) is None
            seconds = min(timeit.repeat(lambda: checker.reason(push), number=CALLS, repeat=RUNS)) / CALLS  # noqa: B023
            kind = f"sampled, {SUPPORT} ids a proposal" if sampled else "greedy"
            print(f"{kind:>28}, {batch_size:>2} blocks in a push: {1e6 * seconds / batch_size:5.1f} µs a block")


if __name__ == "__main__":
    main()
