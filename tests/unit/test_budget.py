"""The branch budget."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.policy import BranchBudget

HIT_CHANCES = [1 - 0.6 * n**-0.8 if n else 0.0 for n in range(25)]
SURVIVAL = [0.8, 0.6, 0.5]


def branches(
    fixed_s: float, per_branch_s: float, window_s: float, num_requests: int = 1, after_misses: Sequence[int] = ()
) -> int:
    budget = BranchBudget(24 * num_requests)
    for i in range(40):
        n = 1 + i % 24
        budget.observe_step(n, fixed_s + per_branch_s * n)
        budget.observe_window(window_s)
    for num_accepted in after_misses:
        budget.observe_miss(num_accepted)
    return budget.branches(3, num_requests, HIT_CHANCES, SURVIVAL)


def test_more_branches_reach_less_depth():
    assert branches(1e-3, 1e-6, window_s=10e-3) == 24, "a whole tree of the largest size fits"
    assert branches(1e-3, 0.2e-3, window_s=10e-3) == 7, "four steps of 2.4 ms fit, of 2.6 ms do not"
    assert 1 <= branches(1e-3, 0.2e-3, window_s=4e-3) <= 3, "even one branch fills the window"
    assert branches(1e-3, 0.2e-3, window_s=1e-4) >= 1
    assert branches(1e-3, 0.05e-3, window_s=10e-3, num_requests=4) <= 7, "requests share a step"


@pytest.mark.parametrize("num_drafts", [3, 16])
def test_a_parallel_drafter_needs_two_steps_whatever_the_depth(num_drafts):
    """Of 1 ms and 0.2 ms for the drafts of a branch: into 3.6 ms fit one over the spine, and one over 7 branches."""
    budget, depths = BranchBudget(24, is_parallel=True), [0.95**j for j in range(1, num_drafts + 1)]
    for i in range(40):
        n = 1 + i % 24
        budget.observe_step(n * num_drafts, 1e-3 + 0.2e-3 * n)
        budget.observe_window(3.6e-3)
    numbers = [budget.branches(num_drafts, 1, HIT_CHANCES, depths) for _ in range(4)]
    assert set(numbers) == {7}
    assert budget.branches(2 * num_drafts, 1, HIT_CHANCES, 2 * depths) < 7, "twice as many drafts take twice the tokens"


@given(st.floats(1e-4, 1e-2), st.floats(1e-6, 1e-3), st.floats(1e-4, 0.1), st.integers(1, 8))
def test_a_longer_window_never_takes_branches_away(fixed_s, per_branch_s, window_s, num_requests):
    few = branches(fixed_s, per_branch_s, window_s, num_requests)
    many = branches(fixed_s, per_branch_s, 1000 * window_s, num_requests)
    assert 1 <= few <= 24 and 1 <= many <= 24
    assert many >= few


def test_fewer_branches_when_drafts_are_accepted_after_a_miss():
    """The more n-gram drafts are accepted after a miss, the more depth is worth compared with hits."""
    numbers = [branches(1e-3, 0.2e-3, 10e-3, after_misses=[k] * 100) for k in range(4)]
    assert branches(1e-3, 0.2e-3, 10e-3) == numbers[0] == 7
    assert numbers == sorted(numbers, reverse=True) and numbers[-1] == 1


@pytest.mark.parametrize("when", [0, 1, 2, 20])
def test_one_step_that_took_seconds_takes_no_branches_away(when):
    """The process was descheduled, or a kernel was compiled that nobody knew of."""
    budget = BranchBudget(24)
    for i in range(40):
        n = 1 + i % 24
        budget.observe_step(n, 5.0 if i == when else 1e-3 + 0.2e-3 * n)
        budget.observe_window(10e-3)
    for _ in range(4):
        assert 6 <= budget.branches(3, 1, HIT_CHANCES, SURVIVAL) <= 9


def test_a_tree_is_in_time_despite_one_step_that_took_seconds():
    budget = BranchBudget(24)
    for seconds in (5.0, 1e-3, 1e-3):
        budget.observe_step(8, seconds)
        budget.observe_window(20e-3)
    assert budget.in_time(0.0, 6) and not budget.in_time(0.0, 20)


@pytest.mark.parametrize("seconds", [1e-5, 1.0])
def test_a_first_window_that_began_elsewhere_takes_no_branches_away(seconds):
    """The drafter had been stopped, or had read a prompt, when it found the outcome before."""
    budget = BranchBudget(24)
    for i in range(40):
        n = 1 + i % 24
        budget.observe_step(n, 1e-3 + 0.2e-3 * n)
    for window_s in (seconds, 10e-3, 10e-3):
        budget.observe_window(window_s)
    assert budget.branches(3, 1, HIT_CHANCES, SURVIVAL) == 7


def test_branches_keep_varying_so_that_their_cost_stays_measurable():
    """Trees of one size alone say nothing about the cost of a branch."""
    budget = BranchBudget(24)

    def settled(per_branch_s: float) -> int:
        used = []
        for _ in range(400):
            n = budget.branches(3, 1, HIT_CHANCES, SURVIVAL)
            budget.observe_window(10e-3)
            for _ in range(4):
                budget.observe_step(n, 1e-3 + per_branch_s * n)
            used.append(n)
        assert len(set(used[-100:])) > 1
        return max(used[-100:], key=used.count)

    assert settled(0.2e-3) in (7, 8)
    assert settled(1e-3) <= 2
    assert settled(1e-6) == 24
    assert settled(0.2e-3) in (7, 8)


def test_the_cost_of_a_branch_is_remembered_while_steps_do_not_differ():
    budget = BranchBudget(24)
    budget.observe_window(10e-3)
    for i in range(40):
        budget.observe_step(1 + i % 24, 1e-3 + 0.2e-3 * (1 + i % 24))
    measured = budget.branches(3, 1, HIT_CHANCES, SURVIVAL)
    for _ in range(5000):
        budget.observe_step(12, 1e-3 + 0.2e-3 * 12)
    for _ in range(200):
        budget.observe_window(4e-3)
    later = [budget.branches(3, 1, HIT_CHANCES, SURVIVAL) for _ in range(100)]
    assert measured == 7 and max(later, key=later.count) <= 3, "the shorter window is not answered"
