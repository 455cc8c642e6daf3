"""What the numbers of gpu_check.py say: the goals of docs/benchmarks.md, and the speed on two devices, simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vllm_ssd.planning import Costs, Recorded, Scenario, Simulation, Workload
from vllm_ssd.planning.measure import HANDOVER_S, LATENCY_S

Row = dict[str, Any]
"""A measurement. kind: what was measured; what: the same for people, with its sizes; value and unit; sizes by name."""

DRAFTS = 5
"""K of everything that is measured."""
FLASH = "vllm flash attention"
"""The name that bench_kernels.py has for it."""
SIMULATED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a goal was reached. result: pass, fail, or not measured; measured: the number in words."""

    goal: str
    result: Literal["pass", "fail", "not measured"]
    measured: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a number. text: as in docs/benchmarks.md, if the goal stands there; find: the number, None for none.

    at_most: which side of `bound` is good; bound_only: on one GPU the number is too large, so that it can only pass.
    """

    text: str
    bound: float
    at_most: bool
    unit: str
    find: Callable[[Sequence[Row]], float | None]
    bound_only: bool = False

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """The verdict on `rows`."""
        value = self.find(rows)
        if value is None:
            return Verdict(self.text, "not measured")
        measured = f"{value:.4g} {self.unit}".rstrip()
        if value <= self.bound if self.at_most else value >= self.bound:
            return Verdict(self.text, "pass", measured)
        if self.bound_only:
            return Verdict(self.text, "not measured", f"at most {measured}, since target and drafter share the GPU")
        return Verdict(self.text, "fail", measured)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """All goals, in the order of the parts."""
    return [goal.judge(rows) for goal in GOALS]


def values(rows: Iterable[Row], kind: str, **sizes: object) -> list[float]:
    """The values of a kind, of those rows that have these sizes."""
    return [row["value"] for row in rows if row["kind"] == kind and all(row.get(k) == v for k, v in sizes.items())]


def largest(kind: str, **sizes: object) -> Callable[[Sequence[Row]], float | None]:
    """The largest value of a kind."""
    return lambda rows: max(values(rows, kind, **sizes), default=None)


def smallest(kind: str, **sizes: object) -> Callable[[Sequence[Row]], float | None]:
    """The smallest value of a kind."""
    return lambda rows: min(values(rows, kind, **sizes), default=None)


def share_of_bandwidth(rows: Sequence[Row]) -> float | None:
    """The smallest of tree attention at long contexts."""
    found = [
        row["of_copy_bandwidth"]
        for row in rows
        if row["kind"] == "tree_attention" and row["way"] == "ours" and row["context"] >= 8192
    ]
    return min(found, default=None)


def gain_over_flash(rows: Sequence[Row]) -> float | None:
    """Of tree attention over FlashAttention with a page table a branch, the smallest at 24 branches and 8k."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "tree_attention" and (row["context"], row["branches"]) == (8192, 24):
            found.setdefault((row["model"], row["requests"]), {})[row["way"]] = row["value"]
    gains = [ways[FLASH] / ways["ours"] for ways in found.values() if {FLASH, "ours"} <= ways.keys()]
    return min(gains, default=None)


def extra_gap(rows: Sequence[Row]) -> float | None:
    """The largest difference in the host's gap between SSD and plain decoding at one batch size, in µs."""
    gaps = {(row["system"], row["batch"]): row["value"] for row in rows if row["kind"] == "gap"}
    return max(
        (us - gaps["plain", b] for (name, b), us in gaps.items() if name == "ssd" and ("plain", b) in gaps),
        default=None,
    )


GOALS = (
    Goal("kernel tests that fail", 0, True, "", largest("failed_tests")),
    Goal("steps of the drafter outside CUDA graphs in steady state", 0, True, "", largest("eager_steps", graphs=True)),
    Goal("CUDA graphs captured in steady state", 0, True, "", largest("late_captures", graphs=True)),
    Goal("greedy requests with the text of plain decoding, up to ties", 1, False, "", smallest("identity")),
    Goal("drafts accepted in the run that compares texts", 1, False, "", smallest("accepted", system="ssd")),
    Goal(
        "V2: the gap between two forwards of the target at most 50 µs longer than plain decoding's",
        50,
        True,
        "µs",
        extra_gap,
        bound_only=True,
    ),
    Goal(
        "`tree_attention`: at least 0.75 of the copy bandwidth at contexts from 8k", 0.75, False, "", share_of_bandwidth
    ),
    Goal(
        "`tree_attention`: at least 3 × vLLM's FlashAttention with one page table per branch, at 24 branches and 8k",
        3,
        False,
        "×",
        gain_over_flash,
    ),
    Goal(
        "`expand` + `copy_pages` + `commit` together: at most 30 µs at 8 requests",
        30,
        True,
        "µs",
        largest("pages", requests=8),
    ),
    Goal("`lookup`: at most 10 µs at 32 requests", 10, True, "µs", largest("lookup", requests=32)),
)


def predictions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Speed over plain decoding with the drafter on a device of its own, simulated with the measured times.

    One for each drafter and batch size that has a verification and draft steps; outcomes as in the trace of the run
    with real text, else as in the recorded one.
    """
    verify = tuple((row["batch"], row["tokens"], row["value"] / 1e3) for row in rows if row["kind"] == "verify")
    traces = [row["trace"] for row in rows if row["kind"] == "trace"]
    steps: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == "draft_step":
            steps.setdefault(row["model"], {})[row["branches"]] = row["value"] / 1e3
    if not verify or not traces:
        return []
    trace = [(m, k, rank, after_hit) for m, k, rank, after_hit in traces[-1]]
    found = []
    for model, by_branches in steps.items():
        costs = Costs(verify, tuple(sorted(by_branches.items())), handover_s=HANDOVER_S, latency_s=LATENCY_S)
        for batch in sorted({batch for batch, _, _ in verify}):
            speed = {method: simulated(costs, trace, method, batch) for method in ("plain", "sd", "ssd")}
            over = {method: speed[method] / speed["plain"] for method in ("sd", "ssd")}
            found.append(
                {
                    "what": f"two devices, {model} drafter, batch {batch}",
                    "model": model,
                    "batch": batch,
                    "tokens_per_s": speed,
                    "text": f"SSD {over['ssd']:.2f} × plain, stock {over['sd']:.2f} × plain (simulated, not measured)",
                }
            )
    return found


def simulated(costs: Costs, trace: list, method: Literal["plain", "sd", "ssd"], batch: int) -> float:
    """Tokens per second of all requests together."""
    scenario = Scenario(method=method, num_drafts=0 if method == "plain" else DRAFTS, on_miss="skip")
    workload = Workload(batch_size=batch, num_requests=2 * batch, tokens=SIMULATED_TOKENS)
    return Simulation(costs, lambda request: Recorded(trace, request), scenario, workload).run().tokens_per_s
