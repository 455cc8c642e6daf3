"""How many branches a drafter should grow before the outcome is known."""

from __future__ import annotations

from collections.abc import Sequence

DECAY = 0.998
MIN_VARIANCE = 1.0
"""In branches squared: steps that differ less say little of what a branch costs; the answer before weighs as much."""
REFRESH_CALLS, REFRESH_CALLS_UNMEASURED = 32, 4
"""Calls between two looks for the best number. The last gets half as many (two for one): steps keep differing."""
MISS_DECAY, MISS_PRIOR = 0.98, 8.0
"""Of the rounds after a miss, which are taken to accept nothing until so many were seen."""
PUNCTUALITY = 4
"""A depth that takes longer than the window by a factor x is still there in time with chance x^-4: times scatter."""


class BranchBudget:
    """Branches for every request, from measured step times t_d(N) = a + b N and the time between outcomes.

    More branches hit more often, but make every step dearer, so that fewer of the K + 1 steps of a tree are done when
    the outcome comes. N maximises the expected drafts accepted: p(N) times the sum of the s_j whose depth j is there in
    time (planner.md, section 2), and 1 - p(N) times what a round after a miss accepts all the same, of n-gram drafts.
    """

    def __init__(self, max_branches: int) -> None:
        self._max_branches = max_branches
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self._per_branch_s: float | None = None
        self._window_s = self._deviation_s = 0.0
        self._misses = self._miss_accepted = 0.0
        self._cache: dict[tuple[int, int], tuple[int, int]] = {}  # (K, requests) -> (branches, calls left)

    def observe_step(self, num_branches: int, seconds: float) -> None:
        """One forward over `num_branches` branches and nothing else."""
        if self._weight > 10:
            seconds = min(seconds, 4 * self._t / self._weight)  # a descheduled step says nothing about its width
        self._weight = DECAY * self._weight + 1
        self._n = DECAY * self._n + num_branches
        self._t = DECAY * self._t + seconds
        self._nn = DECAY * self._nn + num_branches * num_branches
        self._nt = DECAY * self._nt + num_branches * seconds

    def observe_window(self, seconds: float) -> None:
        """Time between two outcomes of a request."""
        seconds = min(seconds, 4 * self._window_s) if self._window_s else seconds
        weight = 0.05 if self._window_s else 1.0
        self._deviation_s += 0.05 * (abs(seconds - self._window_s) - self._deviation_s) if self._window_s else 0.0
        self._window_s += weight * (seconds - self._window_s)

    def observe_miss(self, num_accepted: int) -> None:
        """The outcome of a round after a miss: drafts accepted that nobody waited for."""
        self._misses = MISS_DECAY * self._misses + 1
        self._miss_accepted = MISS_DECAY * self._miss_accepted + num_accepted

    def in_time(self, elapsed_s: float, num_steps: int) -> bool:
        """Whether `num_steps` more steps will surely be done when the next outcome comes."""
        if not self._weight or not self._window_s:
            return False
        surely_s = self._window_s - 2 * self._deviation_s
        return elapsed_s + num_steps * self._t / self._weight < 0.9 * surely_s

    def branches(
        self, num_drafts: int, num_requests: int, hit_chances: Sequence[float], survival: Sequence[float]
    ) -> int:
        """Branches that each of `num_requests` should grow `num_drafts` deep; the configured maximum until measured.

        hit_chances[n] is the chance that n branches hold the outcome; survival[j - 1] that at least j drafts of a hit
        are accepted.
        """
        most = min(self._max_branches // num_requests, len(hit_chances) - 1)
        branches, calls_left = self._cache.get((num_drafts, num_requests), (most, 0))
        if not calls_left:
            step = self._fit_step()
            calls_left = REFRESH_CALLS_UNMEASURED if step is None else REFRESH_CALLS
            if step is not None and self._window_s:
                after_miss = self._miss_accepted / (self._misses + MISS_PRIOR)

                def drafts(n: int) -> float:
                    timely = self._timely_drafts(step[0] + step[1] * n * num_requests, survival)
                    return hit_chances[n] * timely + (1 - hit_chances[n]) * after_miss

                branches = max(range(1, most + 1), key=drafts)
        self._cache[num_drafts, num_requests] = branches, calls_left - 1
        if calls_left == 1 and self._window_s:
            branches = branches // 2 or 2
        return min(branches, most)

    def _timely_drafts(self, step_s: float, survival: Sequence[float]) -> float:
        """Expected accepted drafts of a hit when a step takes `step_s`; depth j is there after j + 1 steps."""
        steps = self._window_s / step_s
        return sum(s * min(1.0, (steps / (j + 1)) ** PUNCTUALITY) for j, s in enumerate(survival, start=1))

    def _fit_step(self) -> tuple[float, float] | None:
        """(a, b) in seconds and seconds a branch by decayed least squares, b also kept for when steps no longer differ.

        None until they did.
        """
        if self._weight < 10:
            return None
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n * mean_n
        covariance = self._nt / self._weight - mean_n * mean_t
        if self._per_branch_s is not None:
            variance, covariance = variance + MIN_VARIANCE, covariance + MIN_VARIANCE * self._per_branch_s
        elif variance < MIN_VARIANCE:
            return None
        self._per_branch_s = min(max(covariance / variance, 1e-7), mean_t / mean_n)
        return max(mean_t - self._per_branch_s * mean_n, 1e-6), self._per_branch_s
