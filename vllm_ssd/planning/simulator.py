"""Discrete-event simulation of the round protocol, with the same policies that run in production.

A target decodes a batch that requests join and leave. Each drafter grows the trees of its share of the requests step by
step. Messages have latency. Accept lengths and ranks of t* come from a recorded trace or are drawn from an
`Acceptance`.
"""

from __future__ import annotations

import functools
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vllm_ssd.planning.outcomes import Outcomes
from vllm_ssd.planning.predict import Fallback, jit_costs
from vllm_ssd.planning.profile import Costs
from vllm_ssd.policy import MAX_LEARNED_FAN_OUT, Adaptation, BranchBudget, FanOut, jit_drafts


@dataclass(frozen=True, slots=True)
class Scenario:
    """A system to simulate.

    protocol: with "push" the target uses the drafts that have arrived; with "ask", as in the published system, it waits
    for the whole tree and, if any row missed, for K just-in-time drafts of the whole batch; fan_out: branches per
    accept length (default: learned within branch_budget); glue_s: duration of the ask protocol's forward before a
    tree's first step; wait_s: longest wait for just-in-time drafts; read_s: a drafter's prefill time per request, push
    protocol only.
    """

    method: Literal["plain", "sd", "ssd"] = "ssd"
    protocol: Literal["push", "ask"] = "push"
    num_drafts: int = 5
    branch_budget: int = 24
    fan_out: int | tuple[int, ...] | None = None
    on_miss: Fallback = "auto"
    adaptive: bool = False
    num_drafters: int = 1
    glue_s: float = 0.0
    wait_s: float = 0.05
    read_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of `tokens` new tokens each, at most `batch_size` at a time; arrivals_per_s: None for all at once."""

    batch_size: int = 1
    num_requests: int = 8
    tokens: int = 512
    arrivals_per_s: float | None = None


@dataclass(slots=True)
class Report:
    """Counts and times of one run.

    seconds: time of the last token; other fields in `_s`: summed over the target's rounds; latencies_s: per request.
    """

    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    row_rounds: int = 0
    hits: int = 0
    misses: int = 0
    late: int = 0
    drafts: int = 0
    verify_s: float = 0.0
    draft_s: float = 0.0  # stock speculation's drafting
    jit_s: float = 0.0  # waits for just-in-time drafts
    build_s: float = 0.0  # waits for trees, ask protocol only
    handover_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Throughput over the whole run."""
        return self.tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up outcomes that hit."""
        outcomes = self.hits + self.misses + self.late
        return self.hits / outcomes if outcomes else 0.0


@dataclass(slots=True)
class _Row:
    """A request on the target. depth: (arrival time, number of drafts) of each push, by accept length."""

    tokens_left: int
    outcomes: Outcomes
    drafter: int
    arrived_s: float
    num_drafts: int = 0
    after_hit: bool = False
    clock: int = 0  # rounds so far; identifies the round that a tree belongs to
    counts: list[int] = field(default_factory=list)
    depth: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    told: int | None = None  # `clock` of the newest round sent to its drafter; None if the request is not open there
    behind: int | None = None  # `clock` of the round from which on its drafter is in time; None if it is already

    def ready(self, accept_length: int, now: float) -> int:
        """Number of drafts that have arrived for an accept length by time `now`."""
        return max((depth for at, depth in self.depth.get(accept_length, ()) if at <= now), default=0)

    def answer(self, clock: int) -> None:
        """Note that the drafter pushed for round `clock`."""
        if self.behind is not None and clock >= self.behind:
            self.behind = None


@dataclass(slots=True)
class _Tree:
    """The token tree of one row.

    counts: branches by accept length; grown: depth reached, by fork point; pending: fork points that start with the
    next step; parallel: one step draws all drafts of a branch.
    """

    row: _Row
    clock: int
    num_drafts: int
    counts: list[int]
    grown: dict[int, int]
    pending: list[int]
    parallel: bool
    looked_ahead: bool = False  # the candidates of the next round's last fork points are known

    def width(self) -> int:
        """Branches that the next step extends, including the spine."""
        growing = sum(self.counts[k] for k, depth in self.grown.items() if depth < self.num_drafts)
        return growing + bool(self.pending)

    def step(self) -> None:
        """Extend every branch by one token, or to full depth with a parallel drafter."""
        for k, depth in self.grown.items():
            self.grown[k] = self.num_drafts if self.parallel else min(depth + 1, self.num_drafts)
        self.grown |= dict.fromkeys(self.pending, 0)
        self.pending = []


class _Drafter:
    """A drafter that grows the trees of its rows in batched steps; outcomes take effect between steps."""

    def __init__(self, simulation: Simulation) -> None:
        scenario = simulation.scenario
        self._simulation = simulation
        self.fan_out = FanOut(scenario.num_drafts, scenario.fan_out, scenario.branch_budget)
        per_row = sum(self.fan_out.counts(scenario.num_drafts, True))
        self._parallel = bool(simulation.costs.parallel)
        self._budget = BranchBudget(simulation.workload.batch_size * per_row, self._parallel)
        self._trees: dict[int, _Tree] = {}
        self._decided_s: dict[int, float] = {}
        self._unread: list[_Row] = []
        self.busy = False

    def open(self, row: _Row, num_drafts: int) -> None:
        """Queue the prefill of `row`, which runs before any further step, and its first tree."""
        self._unread.append(row)
        self.receive(row, num_drafts, tree_known=False)

    def receive(self, row: _Row, num_drafts: int, tree_known: bool) -> None:
        """Take an outcome and start the tree for the round that `row` now runs, with `row.num_drafts` drafts.

        num_drafts: wanted depth of branches; tree_known: the drafts come from the previous tree
        """
        simulation, key, m = self._simulation, id(row), row.num_drafts
        if key in self._decided_s:
            self._budget.observe_window(simulation.now - self._decided_s[key])
        self._decided_s[key] = simulation.now
        if not row.tokens_left:
            self._trees.pop(key, None)
            del self._decided_s[key]
            return
        before = self._trees.get(key)
        looked_ahead = before is not None and before.looked_ahead and m == before.num_drafts
        branches = self._budget.branches(
            num_drafts,
            max(len(self._trees), 1),
            self.fan_out.hit_chances(num_drafts, True),
            self.fan_out.survival(num_drafts, True),
        )
        counts = self.fan_out.counts(m, row.after_hit, branches)
        ready = [k for k in range(m + 1) if tree_known and (k < m or looked_ahead)]
        if self._parallel:  # candidates after the bonus token are known, those after drafts are not
            ready = [0] if tree_known else []
        pending = [k for k in range(m + 1) if k not in ready]
        self._trees[key] = _Tree(row, row.clock, num_drafts, counts, dict.fromkeys(ready, 0), pending, self._parallel)
        row.counts = counts
        if not self.busy:
            self._step()

    def _step(self) -> None:
        if self._unread:
            self.busy = True
            self._unread.pop()
            self._simulation.after(self._simulation.scenario.read_s, self._step)
            return
        trees = [tree for tree in self._trees.values() if tree.width()]
        look_ahead = not trees
        if look_ahead:
            trees = [tree for tree in self._trees.values() if not tree.looked_ahead and not self._parallel]
        width = sum(sum(tree.counts) if look_ahead else tree.width() for tree in trees)
        self.busy = bool(width)
        if not width:
            return
        num_drafts = self._simulation.scenario.num_drafts
        seconds = self._simulation.costs.draft_step_s(width, num_drafts) * self._simulation.jitter()
        self._budget.observe_step(width * num_drafts if self._parallel else width, seconds)
        self._simulation.after(seconds, lambda: self._stepped(trees, look_ahead))

    def _stepped(self, trees: list[_Tree], look_ahead: bool) -> None:
        arrival = self._simulation.now + self._simulation.costs.latency_s / 2
        for tree in trees:
            if look_ahead:
                tree.looked_ahead = True
                continue
            tree.step()
            self._simulation.after(arrival - self._simulation.now, functools.partial(tree.row.answer, tree.clock))
            if tree.clock != tree.row.clock:
                continue
            for k, depth in tree.grown.items():
                if tree.counts[k]:
                    tree.row.depth.setdefault(k, []).append((arrival, depth))
        self._simulation.after(0.0, self._step)


class Simulation:
    """A single run. outcomes: returns the source of outcomes for a request's number."""

    def __init__(
        self,
        costs: Costs,
        outcomes: Callable[[int], Outcomes],
        scenario: Scenario,
        workload: Workload,
        seed: int = 0,
    ) -> None:
        self.costs, self.scenario, self.workload = costs, scenario, workload
        self.now = 0.0
        self._outcomes, self._random = outcomes, random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._rows: list[_Row] = []
        self._arrivals = self._arrival_times()
        self._drafters = [_Drafter(self) for _ in range(scenario.num_drafters)]
        self._adaptation = Adaptation(scenario.num_drafts) if scenario.adaptive else None
        self._num_joined = 0
        self._tree_done_s = 0.0  # ask protocol: time at which the drafter's tree will be complete
        self._wanted = scenario.num_drafts
        self._drafters_in_time = True  # whether they were when the round began
        self.report = Report()

    def run(self) -> Report:
        """Run until every request has its tokens."""
        self.after(0.0, self._start_round)
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self.report

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Schedule `event` in `seconds`; events at equal times run in the order scheduled."""
        self._num_events += 1
        heapq.heappush(self._events, (self.now + seconds, self._num_events, event))

    def jitter(self) -> float:
        """A random factor around 1 with the measured spread."""
        return max(0.5, self._random.gauss(1.0, self.costs.spread)) if self.costs.spread else 1.0

    def _arrival_times(self) -> list[float]:
        rate, now, times = self.workload.arrivals_per_s, 0.0, []
        for _ in range(self.workload.num_requests):
            now += self._random.expovariate(rate) if rate else 0.0
            times.append(now)
        return times

    # ---- the target --------------------------------------------------------------------------------------

    def _start_round(self) -> None:
        while len(self._rows) < self.workload.batch_size and self._arrivals and self._arrivals[0] <= self.now:
            self._join(self._arrivals.pop(0))
        if not self._rows:
            if self._arrivals:
                self.after(max(self._arrivals[0] - self.now, 0.0), self._start_round)
            return
        report, costs, scenario = self.report, self.costs, self.scenario
        batch_size, drafts = len(self._rows), sum(row.num_drafts for row in self._rows)
        verify_s = costs.verify_s(batch_size, 1 + drafts / batch_size)
        if any(drafter.busy for drafter in self._drafters):
            verify_s *= costs.slowdown
        verify_s *= self.jitter()
        draft_s = 0.0
        if scenario.method == "sd":
            draft_s = costs.steps(scenario.num_drafts) * costs.sync_step_s(batch_size)
        elif scenario.method == "ssd" and scenario.protocol == "ask":
            fan_out = self._drafters[0].fan_out
            branches = sum(sum(fan_out.counts(row.num_drafts, row.after_hit)) for row in self._rows)
            share = branches / scenario.num_drafters
            tree_s = costs.steps(scenario.num_drafts) * costs.draft_step_s(share, scenario.num_drafts)
            self._tree_done_s = self.now + scenario.glue_s + tree_s
        report.rounds += 1
        report.row_rounds += batch_size
        report.drafts += drafts
        report.verify_s += verify_s
        report.draft_s += draft_s
        started = self.now
        self._drafters_in_time = all(row.behind is None for row in self._rows)
        self.after(verify_s + draft_s, lambda: self._finish_round(started))

    def _join(self, arrived_s: float) -> None:
        number, self._num_joined = self._num_joined, self._num_joined + 1
        drafter = number % self.scenario.num_drafters
        row = _Row(self.workload.tokens, self._outcomes(number), drafter, arrived_s)
        if self.scenario.method == "sd":
            row.num_drafts, row.after_hit = self.scenario.num_drafts, True
        self._rows.append(row)
        if self._pushes:
            self._send_outcome(row, tree_known=False)

    @property
    def _pushes(self) -> bool:
        return self.scenario.method == "ssd" and self.scenario.protocol == "push"

    def _finish_round(self, started: float) -> None:
        """Process all outcomes: count tokens, look up the next drafts, and wait for missed rows if that pays."""
        report = self.report
        drawn = [row.outcomes.draw(row.num_drafts, row.after_hit) for row in self._rows]
        accepted = [k for k, _ in drawn]
        if self._adaptation:
            offered = [row.num_drafts for row in self._rows]
            seconds, in_time = self.now - started, self._drafters_in_time
            self._adaptation.observe(len(self._rows), self._wanted, offered, accepted, seconds, in_time)
            self._wanted = self._adaptation.choose(len(self._rows))
        missed: list[_Row] = []
        for row, (k, rank) in zip(self._rows, drawn):
            emitted = min(1 + k, row.tokens_left)
            row.tokens_left -= emitted
            report.tokens += emitted
            if self.scenario.method == "ssd":
                self._look_up(row, k, rank, missed)
        report.seconds = self.now
        wait_s = 0.0
        if self.scenario.method == "ssd" and self.scenario.protocol == "ask":
            wait_s = self._wait_for_reply(missed)
        elif self.scenario.method == "ssd":
            wait_s = self._push_outcomes(missed, sum(accepted) + len(accepted), self.now - started)
        for row in self._rows:
            if not row.tokens_left:
                report.latencies_s.append(self.now - row.arrived_s)
        self._rows = [row for row in self._rows if row.tokens_left]
        handover_s = self.costs.handover_s if self.scenario.method == "ssd" else 0.0
        report.handover_s += handover_s
        self.after(wait_s + handover_s, self._start_round)

    def _look_up(self, row: _Row, k: int, rank: int | None, missed: list[_Row]) -> None:
        report, m = self.report, row.num_drafts
        ask = self.scenario.protocol == "ask"
        fan_out = self._drafters[row.drafter].fan_out
        counts = fan_out.counts(m, row.after_hit) if ask else row.counts
        covered = rank is not None and k < len(counts) and rank < counts[k]
        depth = self.scenario.num_drafts if ask else min(row.ready(k, self.now), self._wanted)
        fan_out.observe(m, k, rank, row.after_hit, MAX_LEARNED_FAN_OUT)
        hit = covered and depth > 0
        report.hits += hit
        report.late += covered and not hit
        report.misses += not covered
        row.num_drafts, row.after_hit = (depth if hit else 0), hit
        row.clock += 1
        row.depth = {}
        if not hit and row.tokens_left:
            missed.append(row)

    # ---- the push protocol -------------------------------------------------------------------------------

    def _send_outcome(self, row: _Row, tree_known: bool, delay_s: float = 0.0) -> None:
        """Send the newest round of `row` to its drafter, opening it there if need be.

        While no drafts are wanted, only the end of a request is sent.
        """
        drafter, wanted = self._drafters[row.drafter], self._wanted
        if not wanted and row.tokens_left:
            return
        if row.told is None and not row.tokens_left:
            return
        act = functools.partial(drafter.receive, row, wanted, tree_known)
        if row.told is None:
            act = functools.partial(drafter.open, row, wanted)
        if row.told is None or row.clock > row.told + 1:
            row.behind = row.clock
        row.told = row.clock
        self.after(delay_s + self.costs.latency_s / 2, act)

    def _push_outcomes(self, missed: list[_Row], tokens: int, seconds: float) -> float:
        """Send the outcomes to the drafters, decide on just-in-time drafts, and return the seconds to wait for them."""
        jit = self._jit_drafts(missed, tokens / seconds) if missed and self._wanted else 0
        wait_s = 0.0
        if jit:
            step_s, first_s = self._jit_costs(missed)
            wait_s = min(first_s + jit * step_s, self.scenario.wait_s)
            self.report.jit_s += wait_s
        waiting = {id(row) for row in missed}
        for row in self._rows:
            if id(row) not in waiting:
                self._send_outcome(row, tree_known=True)
            else:
                row.num_drafts = jit
                self._send_outcome(row, tree_known=jit > 0, delay_s=wait_s)
        return wait_s

    def _jit_drafts(self, missed: list[_Row], rate: float) -> int:
        scenario = self.scenario
        if scenario.on_miss == "skip":
            return 0
        if scenario.on_miss == "wait":
            return self._wanted
        fan_out = self._drafters[0].fan_out
        survival = fan_out.survival(self._wanted, False)
        step_s, first_s = self._jit_costs(missed)
        return jit_drafts(len(missed), self._wanted, survival, rate, first_s, step_s, scenario.wait_s)

    def _jit_costs(self, missed: list[_Row]) -> tuple[float, float]:
        scenario = self.scenario
        return jit_costs(self.costs, -(-len(missed) // scenario.num_drafters), scenario.num_drafts)

    # ---- the ask protocol --------------------------------------------------------------------------------

    def _wait_for_reply(self, missed: list[_Row]) -> float:
        """Seconds to wait for the whole tree and, if any row missed, for K drafts of the whole batch."""
        costs, scenario = self.costs, self.scenario
        build_s = max(self._tree_done_s - self.now, 0.0)
        jit_s = 0.0
        if missed and scenario.on_miss != "skip":
            step_s = costs.draft_step_s(len(self._rows) / scenario.num_drafters, scenario.num_drafts)
            jit_s = costs.steps(scenario.num_drafts) * step_s
            for row in missed:
                row.num_drafts = scenario.num_drafts
        self.report.build_s += build_s
        self.report.jit_s += jit_s
        return build_s + jit_s + costs.latency_s
