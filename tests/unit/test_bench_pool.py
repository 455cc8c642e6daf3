"""The arithmetic of `scripts/bench_pool.py`."""

from __future__ import annotations

import sys

import pytest
from script_modules import SCRIPTS

sys.path.insert(0, str(SCRIPTS))

import bench_pool  # noqa: E402


def test_percentiles_are_in_microseconds():
    times = bench_pool.percentiles([1e-6 * i for i in range(101)])
    assert times == {"p50": pytest.approx(50.0), "p99": pytest.approx(99.0)}


def test_ratios_are_those_of_neighbours():
    found = bench_pool.ratios([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert found == {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "max": 3.0}
    for ours, theirs in (([1.0], [1.0]), ([], []), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="give no ratios"):
            bench_pool.ratios(ours, theirs)


def test_a_goal_is_for_the_median():
    name = "TLS / TCP at 62 kB"
    assert bench_pool.verdicts({name: {"median": 2.5, "max": 9.0}}) == {name: True}
    assert bench_pool.verdicts({name: {"median": 2.51, "max": 2.51}}) == {name: False}


def test_drafters_that_do_not_hit_or_keep_up_prove_nothing():
    def side(hit_rate: float, late_rate: float) -> list[dict[str, float]]:
        return [{"hit_rate": hit_rate, "late_rate": late_rate}] * 3

    def check(own: list[dict[str, float]], elsewhere: list[dict[str, float]]) -> None:
        bench_pool.check_hidden(bench_pool.medians({"own": own, "elsewhere": elsewhere}))

    check(side(0.6, 0.1), side(0.3, 0.5))  # links that make blocks late are what is measured
    with pytest.raises(SystemExit, match="no hits with drafters of kind 'elsewhere'"):
        check(side(0.6, 0.0), side(0.0, 0.0))
    with pytest.raises(SystemExit, match="20% of the outcomes"):
        check(side(0.6, 0.2), side(0.6, 0.0))


def test_pushes_have_the_sizes_that_they_are_called():
    from vllm_ssd.link.protocol import encode

    small, large = (len(encode(bench_pool.push_of(num_drafts))) for num_drafts in bench_pool.SIZES.values())
    assert 500 <= small <= 900 and 61_000 <= large <= 64_000
