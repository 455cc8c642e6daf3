"""How many branches a drafter should grow before the outcome is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

DECAY = 0.998
"""Factor on the weight of earlier steps, per step."""
MIN_STEPS = 10
"""Decayed number of steps before the first fit."""
MIN_VARIANCE = 1.0
"""Variance in branches per step required by the first fit, and the weight of the previous slope in later fits."""
MAX_OUTLIER = 4
"""Cap on durations: on a step's as a multiple of the recent median, on a window's as a multiple of the mean."""
RECENT_STEPS, FIRST_STEPS = 15, 3
"""Steps in that median, and steps to collect before any of them counts."""
FIRST_WINDOWS = 3
"""Windows whose median initialises the mean, because the first may include reading a prompt."""
WINDOW_WEIGHT = 0.05
"""Weight of the newest window in the mean and in the mean deviation."""
REFRESH_CALLS, REFRESH_CALLS_UNMEASURED = 32, 4
"""Calls between two optimisations once step times are known, and before."""
MISS_DECAY = 0.98
"""Factor on the weight of earlier rounds after a miss, per round."""
MISS_PRIOR = 8.0
"""Prior weight, in rounds after a miss, of accepting nothing."""
PUNCTUALITY = 4
"""Exponent of the chance x^-4 that a depth which takes x > 1 windows is still in time: durations scatter."""


class BranchBudget:
    """Number of branches per request, from measured step times t_d(N) = a + b N and the time between outcomes.

    More branches hit more often but make every step slower, so fewer of a tree's K + 1 steps are done when the outcome
    arrives. N maximises the expected number of accepted drafts: hit rate p(N) times the survival of the depths reached
    in time, plus 1 - p(N) times the n-gram drafts accepted after a miss (docs/theory.md, Throughput).

    is_parallel: the drafter draws all drafts of a branch in one step, which follows a step over the spines. N in t_d
    then counts tokens per step, one for each draft of each branch.
    """

    def __init__(self, max_branches: int, is_parallel: bool = False) -> None:
        self._max_branches = max_branches
        self._is_parallel = is_parallel
        # Decayed sums over steps: 1, N, t, N^2 and N t.
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)  # branches and seconds of the last steps
        self._per_branch_s: float | None = None  # the slope b, None until steps of different sizes were measured
        self._first_windows: list[float] = []
        self._window_s = self._deviation_s = 0.0
        self._misses = self._miss_accepted = 0.0
        self._cache: dict[tuple[int, int], tuple[int, int]] = {}  # (K, requests) -> (branches, calls left)

    def observe_step(self, num_branches: int, seconds: float) -> None:
        """Learn from one forward over `num_branches` branches only, without compilation or graph capture.

        num_branches: tokens instead of branches if the drafter is parallel
        """
        self._recent.append((num_branches, seconds))
        if len(self._recent) < FIRST_STEPS:
            return
        most = MAX_OUTLIER * median(seconds for _, seconds in self._recent)
        for branches, measured in [(num_branches, seconds)] if self._weight else list(self._recent):
            self._count_step(branches, min(measured, most))

    def _count_step(self, num_branches: int, seconds: float) -> None:
        self._weight = DECAY * self._weight + 1
        self._n = DECAY * self._n + num_branches
        self._t = DECAY * self._t + seconds
        self._nn = DECAY * self._nn + num_branches * num_branches
        self._nt = DECAY * self._nt + num_branches * seconds

    def observe_window(self, seconds: float) -> None:
        """Learn the window, the time between two outcomes of a request."""
        if len(self._first_windows) < FIRST_WINDOWS:
            self._first_windows.append(seconds)
            self._window_s = median(self._first_windows)
            return
        difference_s = min(seconds, MAX_OUTLIER * self._window_s) - self._window_s
        self._deviation_s += WINDOW_WEIGHT * (abs(difference_s) - self._deviation_s)
        self._window_s += WINDOW_WEIGHT * difference_s

    def observe_miss(self, num_accepted: int) -> None:
        """Learn how many drafts a round after a miss accepted, not counting those the target waited for."""
        self._misses = MISS_DECAY * self._misses + 1
        self._miss_accepted = MISS_DECAY * self._miss_accepted + num_accepted

    def in_time(self, elapsed_s: float, num_steps: int) -> bool:
        """Whether `num_steps` more steps will almost certainly finish before the next outcome.

        elapsed_s: time since the last outcome. False until a step and a window have been measured.
        """
        if not self._weight or not self._window_s:
            return False
        surely_s = self._window_s - 2 * self._deviation_s
        return elapsed_s + num_steps * self._t / self._weight < 0.9 * surely_s

    def branches(
        self, num_drafts: int, num_requests: int, hit_chances: Sequence[float], survival: Sequence[float]
    ) -> int:
        """Branches that each of `num_requests` should grow `num_drafts` deep; the configured maximum until measured.

        `hit_chances[n]`: chance that n branches contain the outcome; `survival[j - 1]`: chance that at least j drafts
        of a hit are accepted. The last call before each optimisation returns half as many branches (2 instead of 1), so
        that step sizes keep varying and the cost per branch stays measurable.
        """
        most = min(max(self._max_branches // num_requests, 1), len(hit_chances) - 1)
        branches, calls_left = self._cache.get((num_drafts, num_requests), (most, 0))
        if not calls_left:
            self._fit_slope()
            cost = self._step_cost()
            calls_left = REFRESH_CALLS_UNMEASURED if cost is None else REFRESH_CALLS
            if cost is not None and self._window_s:
                tokens = num_drafts if self._is_parallel else 1  # per branch, or per spine, in one step
                branches = self._optimise(cost, most, tokens * num_requests, hit_chances, survival)
        self._cache[num_drafts, num_requests] = branches, calls_left - 1
        if calls_left == 1 and self._window_s:
            branches = branches // 2 or 2
        return min(branches, most)

    def _optimise(
        self,
        cost: tuple[float, float],
        most: int,
        tokens: int,
        hit_chances: Sequence[float],
        survival: Sequence[float],
    ) -> int:
        """The number of branches, 1 to `most`, that maximises the expected accepted drafts.

        cost: a and b of `_step_cost`; tokens: in a step over one branch of every request
        """
        fixed_s, per_branch_s = cost
        after_miss = self._miss_accepted / (self._misses + MISS_PRIOR)

        spines_s = fixed_s + per_branch_s * tokens

        def accepted(n: int) -> float:
            timely = self._timely_drafts(fixed_s + per_branch_s * n * tokens, spines_s, survival)
            return hit_chances[n] * timely + (1 - hit_chances[n]) * after_miss

        return max(range(1, most + 1), key=accepted)

    def _timely_drafts(self, step_s: float, spines_s: float, survival: Sequence[float]) -> float:
        """Expected accepted drafts of a hit if a step takes `step_s`, and a step over the spines alone `spines_s`.

        Depth j is reached after j + 1 steps; a parallel drafter reaches all depths after one step of each kind.
        """
        if self._is_parallel:
            return sum(survival) * min(1.0, (self._window_s / (spines_s + step_s)) ** PUNCTUALITY)
        steps = self._window_s / step_s
        return sum(s * min(1.0, (steps / (j + 1)) ** PUNCTUALITY) for j, s in enumerate(survival, start=1))

    def _step_cost(self) -> tuple[float, float] | None:
        """The coefficients of t_d(N) = a + b N, in seconds and seconds per branch; None until b has been fitted."""
        if self._per_branch_s is None:
            return None
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        return max(mean_t - self._per_branch_s * mean_n, 1e-6), self._per_branch_s

    def _fit_slope(self) -> None:
        """Fit b by decayed least squares with the previous slope as prior; b stays None while all steps are alike."""
        if self._weight < MIN_STEPS:
            return
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n * mean_n
        covariance = self._nt / self._weight - mean_n * mean_t
        if self._per_branch_s is not None:
            variance, covariance = variance + MIN_VARIANCE, covariance + MIN_VARIANCE * self._per_branch_s
        elif variance < MIN_VARIANCE:
            return
        self._per_branch_s = min(max(covariance / variance, 1e-7), mean_t / mean_n)
