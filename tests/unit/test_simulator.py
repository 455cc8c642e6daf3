"""The event simulator: bookkeeping, published numbers, and agreement with the planner's predictions."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ssd.planning import (
    Acceptance,
    Costs,
    Profile,
    Report,
    Scenario,
    Setting,
    Simulation,
    Synthetic,
    Workload,
    predict_ssd,
)
from vllm_ssd.planning import published as paper
from vllm_ssd.planning.predict import Fallback

COSTS = Costs(
    verify=((1, 1, 0.0102), (1, 4, 0.0108), (1, 9, 0.0118), (8, 1, 0.012), (8, 4, 0.015), (8, 9, 0.02)),
    draft_step=((1.0, 0.0016), (8.0, 0.0018), (48.0, 0.0026), (384.0, 0.009)),
    handover_s=2e-4,
    latency_s=2e-4,
    spread=0.08,
)
LAW = dataclasses.replace(Acceptance.prior(0.7), rounds=1000)


def simulate(costs: Costs, acceptance: Acceptance, scenario: Scenario, workload: Workload, seed: int = 0) -> Report:
    return Simulation(costs, lambda i: Synthetic(acceptance, i), scenario, workload, seed).run()


@pytest.mark.parametrize("scenario", [Scenario(), Scenario(protocol="ask"), Scenario("sd"), Scenario("plain")])
def test_every_request_gets_its_tokens_while_the_batch_changes(scenario):
    report = simulate(COSTS, LAW, scenario, Workload(4, 20, 50, arrivals_per_s=10))
    assert report.tokens == 20 * 50 and len(report.latencies_s) == 20
    assert all(0 < seconds < report.seconds for seconds in report.latencies_s)
    parts = report.verify_s + report.draft_s + report.jit_s + report.build_s + report.handover_s
    assert 0 < parts <= report.seconds + 1e-9 or scenario.method == "ssd"
    assert report.hits + report.misses + report.late == (report.row_rounds if scenario.method == "ssd" else 0)


def test_runs_with_the_same_seed_are_identical():
    runs = [simulate(COSTS, LAW, Scenario(), Workload(4, 8, 100), seed=3) for _ in range(2)]
    assert runs[0] == runs[1] != simulate(COSTS, LAW, Scenario(), Workload(4, 8, 100), seed=4)


@pytest.mark.parametrize("on_miss", ["skip", "auto", "wait"])
@pytest.mark.parametrize(
    ("batch_size", "num_drafts", "num_drafters"), [(1, 2, 1), (1, 4, 1), (1, 8, 1), (8, 3, 1), (8, 5, 1), (8, 5, 4)]
)
def test_predictions_agree_with_the_simulation(batch_size, num_drafts, num_drafters, on_miss):
    """The planner's fixed point against the simulated protocol with the policies that serve."""
    check_prediction(COSTS, batch_size, num_drafts, num_drafters, on_miss)


@pytest.mark.parametrize("on_miss", ["skip", "auto", "wait"])
@pytest.mark.parametrize(
    ("batch_size", "num_drafts", "step_s"), [(1, 5, 1e-3), (1, 12, 3e-3), (1, 8, 4e-3), (8, 5, 2e-3)]
)
def test_predictions_of_a_parallel_drafter_agree_with_the_simulation(batch_size, num_drafts, step_s, on_miss):
    """A round of it takes two steps, however many drafts: those of 4 ms fit, of which 13 in a row would not."""
    simulated = check_prediction(parallel_costs(step_s), batch_size, num_drafts, 1, on_miss)
    assert simulated.late < 0.02 * simulated.row_rounds


def test_a_parallel_drafter_of_long_steps_is_late():
    simulated = check_prediction(parallel_costs(9e-3), 1, 8, 1, "skip")
    assert simulated.late > 0.9 * simulated.row_rounds


def parallel_costs(step_s: float) -> Costs:
    """Costs of a drafter whose steps over one branch of eight drafts take so long."""
    steps = tuple((n, step_s * factor) for n, factor in ((1.0, 1.0), (48.0, 1.4), (384.0, 4.0)))
    return dataclasses.replace(COSTS, draft_step=steps, parallel=8)


def check_prediction(costs: Costs, batch_size: int, num_drafts: int, num_drafters: int, on_miss: Fallback) -> Report:
    budget = 4 * (num_drafts + 1)
    predicted = predict_ssd(
        Profile("t", "d", costs, (LAW,)), LAW, Setting(batch_size, num_drafts, budget, on_miss, num_drafters)
    )
    scenario = Scenario(num_drafts=num_drafts, branch_budget=budget, on_miss=on_miss, num_drafters=num_drafters)
    simulated = simulate(costs, LAW, scenario, Workload(batch_size, 6 * batch_size, 400))
    assert predicted.tokens_per_s == pytest.approx(simulated.tokens_per_s, rel=0.06)
    assert predicted.hit_rate == pytest.approx(simulated.hit_rate, abs=0.05)
    return simulated


# ---- published numbers -----------------------------------------------------------------------------------

PROFILE = paper.published_profile()


def test_batch_1_is_within_10_percent_of_all_three_published_systems():
    workload = Workload(1, 8, 512)
    plain = simulate(PROFILE.costs, PROFILE.acceptance[0], Scenario("plain"), workload)
    assert plain.tokens_per_s == pytest.approx(paper.PLAIN_TOKENS_PER_S, rel=0.1)
    sd = simulate(PROFILE.costs, paper.published_sd_acceptance(), paper.PUBLISHED_SD, workload)
    assert sd.tokens_per_s == pytest.approx(paper.SD_TOKENS_PER_S, rel=0.1)
    ssd = simulate(PROFILE.costs, PROFILE.acceptance[0], paper.PUBLISHED_SSD, workload)
    assert ssd.tokens_per_s == pytest.approx(paper.SSD_TOKENS_PER_S, rel=0.1)
    assert ssd.hit_rate == pytest.approx(paper.HIT_RATE, abs=0.02)


def test_stalls_explain_the_published_systems_gap_at_batch_16():
    """Waiting for just-in-time drafts and for trees takes about half of a round; without it, 2.2 times the rate."""
    simulated = {
        b: simulate(PROFILE.costs, PROFILE.acceptance[0], paper.PUBLISHED_SSD, Workload(b, 4 * b, 512))
        for b in paper.SSD_BY_BATCH
    }
    for batch_size, measured in paper.SSD_BY_BATCH.items():
        assert simulated[batch_size].tokens_per_s == pytest.approx(measured, rel=0.1)
    large = simulated[16]
    stalls_s = large.jit_s + large.build_s
    assert large.jit_s / large.rounds == pytest.approx(0.0124, rel=0.15)
    assert 0.4 < stalls_s / large.seconds < 0.55
    without = large.tokens / (large.seconds - stalls_s)
    assert without == pytest.approx(4254, rel=0.1)


def test_pushing_avoids_the_stalls_at_batch_16():
    asked = simulate(PROFILE.costs, PROFILE.acceptance[0], paper.PUBLISHED_SSD, Workload(16, 64, 256))
    pushed = simulate(PROFILE.costs, PROFILE.acceptance[0], Scenario(num_drafts=6), Workload(16, 64, 256))
    assert pushed.tokens_per_s > 1.3 * asked.tokens_per_s


def test_more_drafters_help_a_large_batch_and_adaptation_a_bad_k():
    profile = PROFILE.acceptance[0]
    rates = [
        simulate(PROFILE.costs, profile, Scenario(num_drafts=6, num_drafters=n), Workload(32, 64, 128)).tokens_per_s
        for n in (1, 2, 4)
    ]
    assert rates[0] < rates[1] <= rates[2] * 1.02
    costly = dataclasses.replace(PROFILE.costs, verify=((8, 1, 0.010), (8, 9, 0.05)))
    rates = {
        (k, adaptive): simulate(
            costly, profile, Scenario(num_drafts=k, adaptive=adaptive, on_miss="skip"), Workload(8, 64, 512)
        ).tokens_per_s
        for k, adaptive in ((1, False), (2, False), (3, False), (8, False), (8, True))
    }
    assert rates[8, True] > rates[8, False]
    assert rates[8, True] > 0.9 * max(rates.values())


def test_the_script_replays_recorded_outcomes(tmp_path):
    trace, out = tmp_path / "trace.jsonl", tmp_path / "reports.json"
    trace.write_text(
        "".join(f"{json.dumps(r)}\n" for r in [(4, 4, 0, True), (4, 1, 0, True), (0, 0, None, False)] * 20)
    )
    script = Path(__file__).parents[2] / "scripts" / "simulate.py"
    options = ["--trace", trace, "--json", out, "--batch-sizes", 2, "--tokens", 40, "--drafts", 4, "--drafters", 1, 2]
    subprocess.run([sys.executable, str(script), *map(str, options)], check=True, capture_output=True)
    reports = {(r["system"], r["drafters"]): r for r in json.loads(out.read_text())}
    assert set(reports) == {("plain", 1), ("sd", 1)} | {
        (system, n) for system in ("ask", "push", "uniform", "adaptive") for n in (1, 2)
    }
    assert all(report["tokens"] == 2 * 4 * 40 for report in reports.values())
    assert 0.5 < reports["ask", 1]["hits"] / reports["ask", 1]["row_rounds"] < 1
    assert reports["push", 1]["tokens_per_s"] > reports["plain", 1]["tokens_per_s"]
