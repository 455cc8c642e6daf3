"""How many branches a drafter can grow before the outcome is known."""

from __future__ import annotations

DECAY = 0.98
KNEE = 0.3
"""When no number of branches is ready in time, grow as many as make a step this much dearer than an empty one."""


class BranchBudget:
    """Branches for all requests together, from measured step times t_d(N) = a + b N and the time between outcomes.

    A whole tree takes K + 1 steps, so N is as large as (K + 1) t_d(N) <= window allows (planner.md, fan-out up to
    the knee of t_d); where even (K + 1) a exceeds the window, fewer branches would not help: N stays at the knee.
    """

    def __init__(self, max_branches: int) -> None:
        self._max_branches = max_branches
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self._window_s = self._deviation_s = 0.0

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

    def in_time(self, elapsed_s: float, num_steps: int) -> bool:
        """Whether `num_steps` more steps will surely be done when the next outcome comes."""
        if not self._weight or not self._window_s:
            return False
        surely_s = self._window_s - 2 * self._deviation_s
        return elapsed_s + num_steps * self._t / self._weight < 0.9 * surely_s

    def branches(self, num_drafts: int) -> int:
        """Branches that a step may hold when `num_drafts` are wanted; the configured maximum until measured."""
        step = self.step_cost()
        if step is None or not self._window_s:
            return self._max_branches
        fixed_s, per_branch_s = step
        in_time = (self._window_s / (num_drafts + 1) - fixed_s) / per_branch_s
        return int(min(max(in_time, KNEE * fixed_s / per_branch_s, 1), self._max_branches))

    def step_cost(self) -> tuple[float, float] | None:
        """(a, b) in seconds and seconds a branch by decayed least squares; None while too little varied."""
        if self._weight < 10:
            return None
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n * mean_n
        if variance < 0.25:
            return None
        per_branch_s = (self._nt / self._weight - mean_n * mean_t) / variance
        per_branch_s = min(max(per_branch_s, 1e-7), mean_t / mean_n)
        return max(mean_t - per_branch_s * mean_n, 1e-6), per_branch_s
