"""Which rounds are counted, against a scheduler that takes each result some steps late."""

from __future__ import annotations

import logging
import random
from collections import Counter, deque

import pytest

from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.v2.verified import VerifiedDrafts

K = 4
COUNTED = ("draft_tokens", "filler_tokens", "accepted_tokens", "drafted_rounds")


class Scheduler:
    """vLLM's, as far as it counts: `num_batches` steps under way, results of requests that have ended thrown away."""

    def __init__(self, num_batches: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.num_batches = num_batches
        self.step = 0
        self.running: dict[int, int] = {}  # drafts of each request's next round
        self.under_way: deque[list[tuple[int, int, int, int]]] = deque()
        self.ended: set[int] = set()
        self.told: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.num_started = self.num_thrown_away = 0

    def take_result(self) -> None:
        for serial, drafts, scheduled, emitted in self.under_way.popleft():
            if serial in self.ended:
                self.num_thrown_away += 1
                continue
            if emitted:
                offered = min(drafts, scheduled)
                self.counts["draft_tokens"] += offered
                self.counts["filler_tokens"] += scheduled - offered
                self.counts["accepted_tokens"] += emitted - 1
                self.counts["drafted_rounds"] += offered > 0
            if serial in self.running and self.rng.random() < 0.15:
                self.ended.add(serial)

    def advance(self, verified: VerifiedDrafts, late: list, idle: bool = False) -> None:
        """One step: tell who has ended and who is preempted, run a round, take the oldest result if all are under way.

        late: calls of `take` that the device has not come to; idle: there is nothing to run
        """
        rng = self.rng
        self.step += 1
        verified.end(self.step, sorted(self.ended - self.told))
        self.told |= self.ended
        self.running = {serial: drafts for serial, drafts in self.running.items() if serial not in self.ended}
        if idle:
            self.running.clear()
        if self.running and rng.random() < 0.1:
            preempted = rng.choice(list(self.running))
            del self.running[preempted]
            verified.preempt(self.step, preempted)
        while not idle and len(self.running) < 4 and rng.random() < 0.5:
            self.running[self.num_started] = 0
            self.num_started += 1
        batch = [serial for serial in self.running if rng.random() < 0.9]
        rows, taken = [], []
        for serial in batch:
            drafts = self.running[serial]
            scheduled = rng.choice((K, K, 1)) if drafts or rng.random() < 0.5 else 0
            emitted = rng.choice((1, 1 + min(drafts, scheduled))) if rng.random() < 0.9 else 0
            rows.append((serial, drafts, scheduled, emitted))
            if emitted:
                self.running[serial] = rng.choice((0, 2, K))
            taken.append((emitted, 9, 2, 0, self.running[serial]))
        self.under_way.append(rows)
        late.append((self.step, batch, [row[2] for row in rows], taken))
        while len(late) > rng.choice((0, 0, 1, 2)):
            verified.take(*late.pop(0))
        if len(self.under_way) == self.num_batches:
            self.take_result()


@pytest.mark.parametrize("num_batches", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_what_vllm_counts_is_counted(num_batches: int, seed: int) -> None:
    metrics = Metrics(K, logging.getLogger("test"))
    verified, scheduler, late = VerifiedDrafts(metrics, num_batches), Scheduler(num_batches, seed), []
    for _ in range(300):
        scheduler.advance(verified, late)
    for _ in range(num_batches + 1):
        scheduler.ended |= set(scheduler.running)  # by their clients
        scheduler.advance(verified, late, idle=True)
    for call in late:
        verified.take(*call)
    assert {name: metrics.counts[name] for name in COUNTED} == {name: scheduler.counts[name] for name in COUNTED}
    assert min(scheduler.counts.values()) > 100 and (scheduler.num_thrown_away > 20) == (num_batches > 1)
    assert not verified._verifying and not verified._left, "requests that have left are remembered"


def test_a_round_of_vllm_s_own_is_not_counted() -> None:
    metrics = Metrics(K, logging.getLogger("test"))
    VerifiedDrafts(metrics, 1).take(1, [-1, 0], [K, K], [(1, 9, 0, -1, 0), (1, 9, 0, -1, 0)])
    assert metrics.counts["filler_tokens"] == K
