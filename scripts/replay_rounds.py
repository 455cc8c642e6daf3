"""Replay ways to choose branches over rounds that `record_rounds.py` recorded, and print their hit rates.

    python scripts/replay_rounds.py bundled=A-*.npz weak=B-*.npz

- marginal: `policy.FanOut`, which learns the mean chances of accept lengths and of ranks.
- weights: the same, but the chance of each accept length is that of this round, from the probabilities of its drafts.
- confidence: `policy.Confidence`, as SSD chooses branches: also the chances of candidates are those of this round.
- last unknown: the same where the candidates after the last draft are not known when branches are chosen, as directly
  after a hit of a drafter that had no time for them.
- oracle: all branches at the accept length that will be, as far as candidates go.

All learn online, from rounds before. Standard errors are from a bootstrap over requests; those of differences are
paired. Late branches are left out: every hit of the table has all its drafts.
"""

import argparse
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
from record_rounds import NUM_CANDIDATES, Rounds
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ssd.policy import Confidence, Draws, FanOut, confidence_levels, uniform_offsets

Levels = tuple[list[int], np.ndarray]
"""Of the drafts of a round [K], and of the other candidates at its fork points [K + 1, C], as for `Confidence`."""


class Marginal:
    """Branches by the mean chances of accept lengths."""

    def __init__(self, num_drafts: int, budget: int, draws: Draws = Draws.GREEDY) -> None:
        self.num_drafts, self.budget, self.draws = num_drafts, budget, draws
        self.fan_out = FanOut(num_drafts, branch_budget=budget)
        self.confidence = Confidence(self.fan_out)

    def counts(self, levels: Levels, after_hit: bool, accept_length: int) -> Sequence[int]:
        """Branches by accept length; `accept_length` is for the oracle."""
        return self.fan_out.counts(self.num_drafts, after_hit, self.budget)

    def learn(self, levels: Levels, after_hit: bool, accept_length: int, rank: int | None) -> None:
        """Learn from an outcome."""
        drafts, candidates = levels
        known = candidates[accept_length]
        self.fan_out.observe(self.num_drafts, accept_length, rank, after_hit, int((known >= 0).sum()))
        self.confidence.observe(self.draws, self.num_drafts, drafts, accept_length, known, rank)


class Weights(Marginal):
    """Branches by this round's chances of accept lengths, and the mean chances of ranks."""

    def counts(self, levels: Levels, after_hit: bool, accept_length: int) -> Sequence[int]:
        """See `Marginal.counts`."""
        unknown = np.full((self.num_drafts + 1, NUM_CANDIDATES), -1)
        return self.confidence.counts(self.draws, levels[0], unknown, after_hit, self.budget)


class ByConfidence(Marginal):
    """Branches by this round's chances of accept lengths and candidates."""

    def counts(self, levels: Levels, after_hit: bool, accept_length: int) -> Sequence[int]:
        """See `Marginal.counts`."""
        return self.confidence.counts(self.draws, *levels, after_hit, self.budget)


class LastUnknown(Marginal):
    """As `ByConfidence`, before the last fork point is computed."""

    def counts(self, levels: Levels, after_hit: bool, accept_length: int) -> Sequence[int]:
        """See `Marginal.counts`."""
        drafts, candidates = levels
        candidates = np.concatenate((candidates[:-1], np.full((1, NUM_CANDIDATES), -1)))
        return self.confidence.counts(self.draws, drafts, candidates, after_hit, self.budget)


class Oracle(Marginal):
    """All branches where the outcome falls."""

    def counts(self, levels: Levels, after_hit: bool, accept_length: int) -> Sequence[int]:
        """See `Marginal.counts`."""
        return [self.budget * (k == accept_length) for k in range(self.num_drafts + 1)]


POLICIES = {
    "marginal": Marginal,
    "weights": Weights,
    "confidence": ByConfidence,
    "last unknown": LastUnknown,
    "oracle": Oracle,
}


def load(pattern: str) -> Rounds:
    """Rounds of all files of a pattern, one file after the other; requests of different files differ."""
    parts = [Rounds.load(Path(path)) for path in sorted(glob(pattern))]
    if not parts:
        raise SystemExit(f"replay_rounds: no file matches {pattern}")
    for number, part in enumerate(parts):
        part.request = part.request + 10_000 * number
    return Rounds(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def levels_of(rounds: Rounds) -> list[Levels]:
    """What the drafter's engine knows of each round: probabilities among the candidates, one of which is the draft."""
    others = rounds.candidate_probs.astype(np.float64)
    if not np.isnan(rounds.uniforms).any():
        offsets = [uniform_offsets(uniforms) for uniforms in rounds.uniforms.tolist()]
        drafts = confidence_levels(np.minimum(rounds.draft_probs, 1)) + np.array(offsets)
        return list(zip(drafts.tolist(), confidence_levels(others / others.sum(2, keepdims=True))))
    is_candidate = rounds.draft_ranks < NUM_CANDIDATES
    drafts = np.where(is_candidate, rounds.draft_probs, others[:, :-1, -1])
    others[:, :-1, -1] = 0.0  # the draft is the candidate in excess
    total = others.sum(2)
    total[:, :-1] += np.where(is_candidate, drafts, 0)
    drafts = drafts / total[:, :-1]
    others /= total[..., None]
    others[:, :-1] /= np.maximum(1 - np.where(is_candidate, drafts, 0), 1e-6)[..., None]
    levels = confidence_levels(others)
    levels[:, :-1, -1] = -1
    return list(zip(confidence_levels(drafts).tolist(), levels))


def replay(rounds: Rounds, levels: list[Levels], policy: Marginal) -> np.ndarray:
    """Which rounds hit, [n] bool."""
    after_hit: dict[int, bool] = {}
    hits = np.zeros(len(rounds.request), bool)
    ranks, lengths = rounds.bonus_rank.tolist(), rounds.accept_length.tolist()
    for i, request in enumerate(rounds.request.tolist()):
        k, known = lengths[i], NUM_CANDIDATES - (lengths[i] < policy.num_drafts)
        rank = ranks[i] if ranks[i] < known else None
        counts = policy.counts(levels[i], after_hit.get(request, False), k)
        hits[i] = rank is not None and rank < counts[k]
        policy.learn(levels[i], after_hit.get(request, False), k, rank)
        after_hit[request] = bool(hits[i])
    return hits


def standard_error(values: np.ndarray, requests: np.ndarray) -> float:
    """Of the mean of `values` [n], by a bootstrap over requests."""
    _, index = np.unique(requests, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    picks = np.random.default_rng(0).integers(len(sums), size=(1000, len(sums)))
    return float((sums[picks].sum(1) / counts[picks].sum(1)).std())


def main() -> None:
    """Replay all policies and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", help="NAME=PATTERN of recorded files")
    parser.add_argument("--budgets", nargs="+", type=int, default=[8, 16, 24, 48], help="branches a round")
    parser.add_argument("--skip", type=int, default=300, help="first rounds that are learned from but not counted")
    args = parser.parse_args()
    table = Table(box=SIMPLE_HEAD)
    for name in ("trace", "rounds", "branches", *POLICIES):
        table.add_column(name, justify="right")
    for trace in args.traces:
        name, pattern = trace.split("=", 1)
        rounds = load(pattern)
        levels, requests = levels_of(rounds), rounds.request[args.skip :]
        draws = Draws.SAMPLED if np.isnan(rounds.uniforms).any() else Draws.FORESEEN
        for budget in args.budgets:
            cells, base = [], None
            for policy in POLICIES.values():
                hits = 100.0 * replay(rounds, levels, policy(rounds.draft_probs.shape[1], budget, draws))[args.skip :]
                if base is None:
                    base = hits
                    cells.append(f"{hits.mean():.1f} ± {standard_error(hits, requests):.1f}")
                else:
                    gain = hits - base
                    error = standard_error(gain, requests)
                    cells.append(f"{hits.mean():.1f} ({gain.mean():+.1f} ± {error:.1f})")
            table.add_row(name, str(len(requests)), str(budget), *cells)
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    main()
