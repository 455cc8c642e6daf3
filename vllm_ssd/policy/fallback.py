"""What a round carries when its outcome was not predicted."""

from collections.abc import Sequence

import numpy as np

WAIT_MARGIN = 0.05


def ngram_drafts(token_ids: np.ndarray, num_drafts: int, min_n: int, max_n: int) -> list[int]:
    """Draft what followed the latest earlier occurrence of the longest matching suffix.

    token_ids [L] int32, oldest first; the suffix has between min_n and max_n tokens.
    -> num_drafts token ids, or none without a match. A match closer to the end than num_drafts repeats its period.
    """
    last = len(token_ids) - 1
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1:])
    length, best = 1, ends
    while length < max_n and ends.size:
        ends = ends[ends >= length]
        ends = ends[token_ids[ends - length] == token_ids[last - length]]
        if ends.size:
            length, best = length + 1, ends
    if length < min_n or not best.size:
        return []
    end = int(best[-1])
    period = token_ids[end + 1 : end + 1 + num_drafts].tolist()
    return [period[i % len(period)] for i in range(num_drafts)]


def jit_drafts(
    num_missed: int,
    max_drafts: int,
    accept_survival: Sequence[float],
    tokens_per_second: float,
    first_s: float,
    step_s: float,
    bound_s: float,
) -> int:
    """Number of just-in-time drafts that the whole batch should wait for; 0 is not to wait.

    accept_survival[j - 1] is the chance that at least j drafts are accepted, tokens_per_second the rate of the whole
    batch, first_s + n * step_s the wait for n drafts. The missed rows' gain must exceed what every row loses by 5 %.
    """
    best, best_net, gain = 0, 0.0, 0.0
    for num_drafts, survival in enumerate(accept_survival[:max_drafts], start=1):
        wait_s = first_s + num_drafts * step_s
        if wait_s > bound_s:
            break
        gain += num_missed * survival
        net = gain - tokens_per_second * wait_s
        if net > best_net and gain > (1 + WAIT_MARGIN) * tokens_per_second * wait_s:
            best, best_net = num_drafts, net
    return best
