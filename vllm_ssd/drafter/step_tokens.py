"""The tokens of one forward of the draft model, independent of where their KV is stored."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.sequence import NO_ROWS, Sequence


class Sampling(NamedTuple):
    """How the tokens after n tokens are drawn; [n] each, `truncations` [n, 3], as in `Branches`."""

    temperatures: np.ndarray
    truncations: np.ndarray
    biases: np.ndarray
    noise_kinds: np.ndarray
    noise_seeds: np.ndarray


@dataclass(slots=True)
class StepTokens:
    """The next tokens of some spines, followed by the next tokens of the branches in `rows`.

    spines: (sequence, number of tokens); rows [r] int64: branches; token_rows, places [m] int64: branch of each branch
    token and its place there (`Branches.due`); token_ids [T] int32, positions [T] int64: all tokens; logit_indices [n]
    int64: the tokens that need logits, spine tokens from the last committed one on, then all branch tokens;
    spine_logits: (sequence, token index) of each spine token with logits.
    """

    spines: SequenceOf[tuple[Sequence, int]]
    rows: np.ndarray
    token_rows: np.ndarray
    places: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    logit_indices: np.ndarray
    spine_logits: list[tuple[Sequence, int]]

    @classmethod
    def gather(cls, branches: Branches, spines: SequenceOf[tuple[Sequence, int]], rows: np.ndarray) -> StepTokens:
        """Gather the next `n` tokens of each (sequence, n) in `spines`, and the next of each branch in `rows`."""
        token_ids: list[int] = []
        positions: list[np.ndarray] = [NO_ROWS]
        logit_indices: list[int] = []
        spine_logits: list[tuple[Sequence, int]] = []
        for sequence, n in spines:
            start = sequence.computed
            for position in range(max(start, sequence.length - 1), start + n):
                logit_indices.append(len(token_ids) + position - start)
                spine_logits.append((sequence, position))
            token_ids.extend(sequence.tokens[start : start + n])
            positions.append(np.arange(start, start + n))
        token_rows, places = branches.due(rows)
        row_indices = len(token_ids) + np.arange(len(token_rows), dtype=np.int64)
        return cls(
            spines,
            rows,
            token_rows,
            places,
            np.concatenate([np.array(token_ids, np.int32), branches.tokens[token_rows, places]]),
            np.concatenate([*positions, branches.base[token_rows] + places]),
            np.concatenate([np.array(logit_indices, np.int64), row_indices]),
            spine_logits,
        )

    def sampling(self, branches: Branches, sequences: SequenceOf[Sequence]) -> Sampling:
        """Of tokens of the spines of `sequences`, one each, followed by the branch tokens."""
        rows = self.token_rows
        of_branches = Sampling(
            branches.temperature[rows],
            branches.truncation[rows],
            branches.bias[rows],
            branches.noise_kind[rows],
            branches.noise_seed[rows],
        )
        if not sequences:
            return of_branches
        of_spines = zip(*((s.temperature, s.truncation, s.bias, s.noise.kind, s.noise.seed) for s in sequences))
        return Sampling(*(np.concatenate((np.array(a, b.dtype), b)) for a, b in zip(of_spines, of_branches)))
