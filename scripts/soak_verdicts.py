"""What a soak may conclude from what it has seen: pure functions of samples and counts.

A stall is a gap between two pieces of one stream. Part of a gap is *starved* when a thread that the stream needs was
ready to run and no core was free (the run delay of /proc/PID/schedstat), or when the client itself came late. What is
left was spent by the server, and is the drafter's doing where it happens under a fault and not without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

STALL_S = 0.25
MB_PER_1000 = 1.0
"""Growth of the server's resident memory per 1,000 requests, after warm-up."""
MIN_REQUESTS = 1000
"""Fewer requests than these tell no leak from an allocator that is still warming up."""
ORPHAN_S = 5.0
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
    """Time between two pieces of one stream, on the monotonic clock; `starved_s` of it no core was free.

    spent: of it by each process, seconds on a core and seconds ready without one
    """

    start: float
    end: float
    starved_s: float = 0.0
    spent: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def served_s(self) -> float:
        """What the server took of it."""
        return self.end - self.start - self.starved_s

    def overlaps(self, windows: Sequence[tuple[float, float]]) -> bool:
        """Whether part of it lies in one of the windows."""
        return any(self.start < end and start < self.end for start, end in windows)


@dataclass(frozen=True, slots=True)
class Stalls:
    """Gaps above `STALL_S`: under a fault, without one, and those of either that starvation explains."""

    under_fault: list[Gap]
    calm: list[Gap]
    starved: list[Gap]
    allowed: int
    """As many under faults as their time would have without any."""


def stalls(gaps: Sequence[Gap], windows: Sequence[tuple[float, float]], seconds: float) -> Stalls:
    """Sort the gaps of a run of `seconds`, of which `windows` were under a fault."""
    long = [gap for gap in gaps if gap.end - gap.start > STALL_S]
    starved = [gap for gap in long if gap.served_s <= STALL_S]
    own = [gap for gap in long if gap.served_s > STALL_S]
    under_fault = [gap for gap in own if gap.overlaps(windows)]
    calm = [gap for gap in own if not gap.overlaps(windows)]
    fault_s = sum(end - start for start, end in windows)
    expected = len(calm) * fault_s / max(seconds - fault_s, 1e-9)
    allowed = math.floor(expected + 2 * math.sqrt(expected))
    return Stalls(under_fault, calm, starved, allowed)


def stall_verdict(found: Stalls) -> Verdict:
    """More stalls under faults than without them are the drafter's."""
    longest = max((gap.served_s for gap in found.under_fault), default=0.0)
    text = f"{len(found.under_fault)} under faults" + (f", longest {1e3 * longest:.0f} ms" if longest else "")
    text += f"; {len(found.calm)} without, {len(found.starved)} for want of a core"
    bound = f"{found.allowed} above {1e3 * STALL_S:.0f} ms"
    return Verdict("stalls of a stream", text, bound, len(found.under_fault) <= found.allowed)


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
    """Whether a process grows with the requests it answers."""
    covered = samples[-1][0] - samples[0][0] if samples else 0
    slope = slope_per_1000(samples) if covered else 0.0
    holds = slope < MB_PER_1000 if covered >= MIN_REQUESTS else None
    text = f"{slope:+.2f} MB per 1,000 requests, over {covered:,}"
    return Verdict(f"memory of {name}", text, f"{MB_PER_1000:g} MB, from {MIN_REQUESTS:,} requests", holds)


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
