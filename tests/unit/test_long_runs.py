"""Long runs of the simulator's loop in which the drafter reads prompts, or shares a core with the target."""

import dataclasses
from statistics import median
from typing import Any

import pytest

from vllm_ssd.planning import Acceptance, Costs, Scenario, Simulation, Synthetic, Workload

K = 5
COSTS = Costs(
    verify=((1, 1, 0.0100), (1, 6, 0.0120)),
    draft_step=((1.0, 0.0007), (24.0, 0.0010)),
    handover_s=2e-4,
    latency_s=2e-4,
    slowdown=1.02,
    spread=0.05,
)


def shared_core(slowdown: float) -> Costs:
    """Costs where either takes so many times longer while both compute."""
    steps = tuple((n, slowdown * seconds) for n, seconds in COSTS.draft_step)
    return dataclasses.replace(COSTS, slowdown=slowdown, draft_step=steps)


SHARED_CORE = shared_core(2.0)


class LongRun(Simulation):
    """Records the drafts that each round asked for; costs_at: costs from a round on."""

    def __init__(self, acceptance: float, workload: Workload, seed: int, **options: Any) -> None:
        law = dataclasses.replace(Acceptance.prior(acceptance), rounds=1000)
        scenario = Scenario(**{"num_drafts": K, "adaptive": True, "on_miss": "skip"} | options)
        super().__init__(COSTS, lambda i: Synthetic(law, i + 100 * seed), scenario, workload, seed)
        self.wanted: list[int] = []
        self.costs_at: dict[int, Costs] = {}

    def _start_round(self) -> None:
        self.costs = self.costs_at.get(len(self.wanted), self.costs)
        before = self.report.rounds
        super()._start_round()
        if self.report.rounds > before:
            self.wanted.append(self._wanted)

    def decode_plainly(self) -> None:
        """Begin as if plain decoding had been found best."""
        probes = self._adaptation._bucket(1).probes
        probes.settled = probes.choice = self._wanted = 0


def share(wanted: list[int]) -> float:
    """Of rounds that were to carry drafts."""
    return sum(map(bool, wanted)) / len(wanted)


def rounds_until(wanted: list[int], start: int, on: bool) -> int:
    """Rounds from `start` to the first 40 of which four fifths are speculative, or plain."""
    shares = (share(wanted[i : i + 40]) for i in range(start, len(wanted) - 40))
    return next(i for i, speculative in enumerate(shares) if (speculative if on else 1 - speculative) > 0.8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("read_s", [0.2, 0.6, 1.5])
def test_a_fresh_server_is_not_judged_while_prompts_are_read(read_s, seed):
    """A prompt takes the drafter 20 to 150 rounds, in which nothing is drafted."""
    run = LongRun(0.6, Workload(1, 3, 400), seed, read_s=read_s)
    run.run()
    assert share(run.wanted[:300]) > 0.95


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("read_s", [0.2, 0.6, 1.5])
def test_a_probe_from_plain_decoding_begins_when_the_drafter_has_read_the_prompt(read_s, seed):
    run = LongRun(0.6, Workload(1, 1, 1500), seed, read_s=read_s)
    run.decode_plainly()
    run.run()
    assert rounds_until(run.wanted, 0, on=True) < 30


def test_speculation_is_off_soon_while_a_shared_core_makes_it_lose_and_back_soon_after():
    """On the shared core every number of drafts loses a quarter or more against plain decoding."""
    plain = 1 / COSTS.verify_s(1, 1)
    for drafts in (1, 2, 5):
        fixed = LongRun(0.4, Workload(1, 1, 1000), 0, num_drafts=drafts, adaptive=False)
        fixed.costs = SHARED_CORE
        assert fixed.run().tokens_per_s < 0.75 * plain
    off, back = [], []
    for seed in range(8):
        run = LongRun(0.4, Workload(1, 4, 1000), seed)
        run.costs_at = {600: SHARED_CORE, 1200: COSTS}
        run.run()
        off.append(rounds_until(run.wanted, 600, on=False))
        back.append(rounds_until(run.wanted, 1200, on=True))
        assert share(run.wanted[700:1200]) < 0.1
    assert max(off) < 100, off
    assert median(back) < 60 and max(back) < 100, back


@pytest.mark.parametrize(("slowdown", "until", "longest"), [(2.0, 3000, 100), (3.0, 1200, 130), (5.0, 1200, 300)])
def test_speculation_is_back_after_long_and_after_heavy_contention(slowdown, until, longest):
    """A probe under contention of factor 5 costs four rounds and more, so that 1.5 % allow one in 270 rounds."""
    back = []
    for seed in range(4):
        run = LongRun(0.4, Workload(1, 4, (until + 800) // 4), seed)
        run.costs_at = {600: shared_core(slowdown), until: COSTS}
        run.run()
        back.append(rounds_until(run.wanted, until, on=True))
        assert share(run.wanted[700:until]) < 0.1
    assert max(back) < longest, back
