"""What a soak may conclude from what it has seen: pure functions of samples and counts.

A stall is a gap between two pieces of one stream. Part of a gap is *starved*: a thread that the stream needs was ready
to run and no core was free (the run delay of /proc/PID/schedstat), it read or wrote a disk, or the client itself came
late. In another part the server computed. In what is left it *waited* for somebody, and that is the drafter where it
happens under a fault and not without one. Pauses of several streams at the same time are one stall.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

CLIENT = "client"
"""This process, among those of the server."""
STALL_S = 0.25
MB_PER_1000 = 1.0
"""Growth of the server's resident memory per 1,000 requests, after warm-up."""
WARM_REQUESTS = 1500
"""Memory is looked at after these: until then kernels are made for sizes of batches that had not come before."""
MIN_REQUESTS = 2000
"""Fewer requests than these, after warm-up, tell nothing."""
STEP_MB = 8.0
"""Growth in all that an allocator's steps explain, as where one more thread gets an arena."""
ORPHAN_S = 5.0
SPARE_STALLS = 6
"""Collections of garbage and kernels compiled on first use stop a server, too, and a short run has little calm time."""
SPARE = 2
"""Descriptors or threads of a process that may come and go between two moments of rest: keep-alive and thread pools."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A line of the table; `holds` is None where the run was too short to tell."""

    what: str
    found: str
    bound: str
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Gap:
    """Time between two pieces of one stream, on the monotonic clock, in seconds.

    starved_s: of it, a thread of the server or the client was kept from running; computed_s: of the rest, a process of
    the server ran; late_s: the client's event loop was late; spent: by each process, seconds on a core, ready without
    one, and at the disk
    """

    start: float
    end: float
    starved_s: float = 0.0
    computed_s: float = 0.0
    late_s: float = 0.0
    spent: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def served_s(self) -> float:
        """What the server took of it."""
        return self.end - self.start - self.starved_s

    @property
    def waited_s(self) -> float:
        """What no process of the server ran in."""
        return self.served_s - self.computed_s

    def __str__(self) -> str:
        parts = [f"{name} {' + '.join(f'{1e3 * t:.0f}' for t in times)}" for name, times in self.spent.items()]
        text = f"{1e3 * (self.end - self.start):.0f} ms: {1e3 * self.waited_s:.0f} waited, "
        text += f"{1e3 * self.computed_s:.0f} computed, {1e3 * self.starved_s:.0f} starved, "
        text += f"client {1e3 * self.late_s:.0f} late"
        return text + (f" (ran + ready + disk: {', '.join(parts)})" if parts else "")

    def overlaps(self, windows: Sequence[tuple[float, float]]) -> bool:
        """Whether part of it lies in one of the windows."""
        return any(self.start < end and start < self.end for start, end in windows)


@dataclass(frozen=True, slots=True)
class Stalls:
    """Stalls of one kind, under a fault and without one; `expected` of the former come without faults, too."""

    under_fault: list[Gap]
    calm: list[Gap]
    expected: float

    def verdict(self, what: str, spare: int, bound_s: float, note: str = "") -> Verdict:
        """No more than are expected, but for their deviation and `spare`."""
        allowed = math.floor(self.expected + 2 * math.sqrt(self.expected)) + spare
        longest = max((gap.served_s for gap in self.under_fault), default=0.0)
        text = f"{len(self.under_fault)} under faults" + (f", longest {1e3 * longest:.0f} ms" if longest else "")
        text += f"; {len(self.calm)} without{note}"
        return Verdict(what, text, f"{allowed} above {1e3 * bound_s:.0f} ms", len(self.under_fault) <= allowed)


def stall_verdicts(
    gaps: Sequence[Gap], windows: Sequence[tuple[float, float]], seconds: float, bound_s: float = STALL_S
) -> list[Verdict]:
    """Judge the gaps of a run of `seconds`, of which `windows` were under a fault, that are longer than the bound."""
    long = stalls(gaps, bound_s)
    own = [gap for gap in long if gap.served_s > bound_s]
    waited = _stalls([gap for gap in own if gap.waited_s > bound_s], windows, seconds)
    busy = _stalls([gap for gap in own if gap.waited_s <= bound_s], windows, seconds)
    note = f"; {len(long) - len(own)} for want of a core"
    return [
        waited.verdict("stalls in which the server waited", 0, bound_s),
        busy.verdict("stalls in which the server computed", SPARE_STALLS, bound_s, note),
    ]


def stalls(gaps: Sequence[Gap], bound_s: float = STALL_S) -> list[Gap]:
    """The gaps longer than the bound, one of those that overlap: of whatever cause."""
    return events([gap for gap in gaps if gap.end - gap.start > bound_s])


def events(gaps: Sequence[Gap]) -> list[Gap]:
    """The longest of each group of gaps that overlap."""
    found: list[Gap] = []
    reaches = -math.inf
    for gap in sorted(gaps, key=lambda gap: gap.start):
        if gap.start >= reaches:
            found.append(gap)
        elif gap.served_s > found[-1].served_s:
            found[-1] = gap
        reaches = max(reaches, gap.end)
    return found


def _stalls(gaps: list[Gap], windows: Sequence[tuple[float, float]], seconds: float) -> Stalls:
    under_fault = [gap for gap in gaps if gap.overlaps(windows)]
    calm = [gap for gap in gaps if not gap.overlaps(windows)]
    fault_s = sum(end - start for start, end in windows)
    return Stalls(under_fault, calm, len(calm) * fault_s / max(seconds - fault_s, 1e-9))


@dataclass(frozen=True, slots=True)
class Sample:
    """What main threads have done until `at`; `times` are those of `Gap.spent`, since each process was started."""

    at: float
    times: dict[str, tuple[float, float, float]]


def account(start: float, end: float, samples: Sequence[Sample], late: Sequence[tuple[float, float]]) -> Gap:
    """Account for a pause by samples in order of time, the first of them before it; `late` are times of a late client.

    Each interval between samples is accounted for by itself: processes of the server take turns, so that what two of
    them ran in a pause may be added, while in one interval the longest counts.
    """
    starved, computed = 0.0, 0.0
    spent: dict[str, list[float]] = {}
    for first, second in itertools.pairwise(samples):
        begins, ends = max(first.at, start), min(second.at, end)
        if ends <= begins:
            continue
        share = (ends - begins) / (second.at - first.at)
        kept_from, ran = _overlap(begins, ends, late), 0.0
        for name in first.times.keys() & second.times.keys():
            times = [share * (b - a) for a, b in zip(first.times[name], second.times[name])]
            spent[name] = [a + b for a, b in zip(spent.get(name, [0.0] * 3), times)]
            kept_from += times[1] + times[2]
            ran = max(ran, times[0] if name != CLIENT else 0.0)
        kept_from = min(kept_from, ends - begins)
        starved += kept_from
        computed += min(ran, ends - begins - kept_from)
    whole = {name: (ran, ready, disk) for name, (ran, ready, disk) in sorted(spent.items())}
    return Gap(start, end, starved, computed, _overlap(start, end, late), whole)


def _overlap(start: float, end: float, spans: Sequence[tuple[float, float]]) -> float:
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in spans)


def slope_per_1000(samples: Sequence[tuple[int, int]]) -> float:
    """Growth in MB per 1,000 requests of (requests answered, bytes resident): the median over all pairs of samples.

    A peak, or a step of the allocator, does not move it; steady growth does.
    """
    requests, resident = (np.asarray(column, float) for column in zip(*samples[:: max(len(samples) // 400, 1)]))
    first, second = np.triu_indices(len(requests), 1)
    apart = requests[second] - requests[first]
    far = apart > 0
    if not far.any():
        return 0.0
    slopes = (resident[second] - resident[first])[far] / apart[far]
    return float(np.median(slopes)) * 1000 / 1e6


def memory_verdict(name: str, samples: Sequence[tuple[int, int]]) -> Verdict:
    """Whether a process grows with the requests it answers, once it is warm."""
    samples = [sample for sample in samples if sample[0] >= samples[0][0] + WARM_REQUESTS]
    covered = samples[-1][0] - samples[0][0] if samples else 0
    slope = slope_per_1000(samples) if covered else 0.0
    bound = max(MB_PER_1000, 1000 * STEP_MB / max(covered, 1))
    holds = slope < bound if covered >= MIN_REQUESTS else None
    text = f"{slope:+.2f} MB per 1,000 requests, over {covered:,}"
    return Verdict(f"memory of {name}", text, f"{bound:.2g} MB, from {MIN_REQUESTS:,} requests", holds)


def rest_verdict(what: str, name: str, before: int, after: int) -> Verdict:
    """Descriptors or threads of a process at rest, at the start and at the end."""
    return Verdict(f"{what} of {name}", f"{before} → {after}", f"+{SPARE}", after - before <= SPARE)


def fallen(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Counters that are lower than before, or gone."""
    return {
        name: (value, after.get(name, math.nan)) for name, value in before.items() if not after.get(name, -1) >= value
    }


def zero(what: str, found: Sequence[str]) -> Verdict:
    """Something of which there may be none; the first is shown."""
    return Verdict(what, f"{len(found)}" + (f": {found[0]}" if found else ""), "0", not found)


def at_least(what: str, found: float, least: float) -> Verdict:
    """Something without which the run proves nothing."""
    return Verdict(what, f"{found:,.0f}", f"at least {least:,.0f}", found >= least)
