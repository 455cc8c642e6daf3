"""What a soak sees of a running server: its processes from /proc, and its metrics page."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from urllib.request import urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families
from soak_faults import drafters_of, is_alive, worker_of
from soak_verdicts import ORPHAN_S, STALL_S, Gap, fallen

TICK_S = 0.02
KEPT_S = 120.0
"""Longer than a request may take."""


class RunDelay:
    """How long main threads of the server ran, and were ready to run while no core was free; how late this client was.

    A thread samples /proc/PID/schedstat, which counts nanoseconds, while the context lasts.
    """

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._pids = {name: process.pid for name, process in processes.items()}
        self._samples: deque[tuple[float, dict[str, tuple[float, float]]]] = deque(maxlen=round(KEPT_S / TICK_S))
        self._late: deque[tuple[float, float]] = deque(maxlen=round(KEPT_S / TICK_S))
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> RunDelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def gap(self, start: float, end: float) -> Gap:
        """A pause of a stream that has just ended, and what the processes did meanwhile."""
        before = next((times for at, times in reversed(self._samples.copy()) if at <= start), None)
        after = self._times()
        spent = {}
        for name in (before or {}).keys() & after.keys():
            spent[name] = tuple(b - a for a, b in zip(before[name], after[name])) if before else (0.0, 0.0)
        late = sum(late for at, late in self._late.copy() if start < at <= end)
        starved = late + sum(delay for _, delay in spent.values())
        return Gap(start, end, min(starved, end - start), spent | {"client": (0.0, late)})

    async def watch_client(self) -> None:
        """Measure how late the client's event loop is, for as long as the task lives."""
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            if now - due > TICK_S:
                self._late.append((now, now - due))

    def _sample(self) -> None:
        while not self._ends.wait(TICK_S):
            self._samples.append((time.monotonic(), self._times()))

    def _times(self) -> dict[str, tuple[float, float]]:
        """Seconds on a core and seconds without one, since each process started."""
        times = {}
        for name, pid in self._pids.items():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/schedstat") as file:
                ran, waited, _ = map(int, file.read().split())
                times[name] = (ran / 1e9, waited / 1e9)
        return times


@dataclass
class Page:
    """Counters and gauges of a metrics page, by name with labels."""

    values: dict[str, float] = field(default_factory=dict)

    @property
    def counters(self) -> dict[str, float]:
        """What may only grow; Python's own metrics are left out, one of which falls."""
        found = {name: name.split("{")[0] for name in self.values}
        return {
            name: self.values[name]
            for name, base in found.items()
            if base.startswith(("vllm", "http")) and base.endswith(("_total", "_count"))
        }

    def get(self, name: str) -> float:
        """A metric of SSD's, summed over engines; 0 where the page has none."""
        return sum(value for key, value in self.values.items() if key.split("{")[0] == f"vllm_ssd:{name}")


def read_page(url: str) -> Page:
    """The metrics page as it is now; raises OSError where nobody answers."""
    with urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    page = Page()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                page.values[f"{sample.name}{{{labels}}}"] = sample.value
    return page


class Watch:
    """The processes and metrics of one server with a drafter, looked at once a second."""

    def __init__(self, url: str, delay: RunDelay, processes: dict[str, psutil.Process]) -> None:
        self.url = url
        self.processes = processes
        self.engine = processes["worker"]
        self.page = read_page(url)
        self.memory: dict[str, list[tuple[int, int]]] = {name: [] for name in processes}
        self.gaps: list[Gap] = []
        self.fell: list[str] = []
        self.orphans: dict[int, str] = {}
        self.dead: list[int] = []  # process ids of drafters
        self.peak_pages = 0.0
        self._delay = delay
        self._reading = asyncio.Lock()
        self._seen: dict[int, float | None] = {}  # drafters, and since when each should be gone

    def gap(self, start: float, end: float) -> None:
        """A pause between two pieces of a stream; only long ones are kept."""
        if end - start > STALL_S:
            self.gaps.append(self._delay.gap(start, end))

    async def look(self, requests: int | None = None) -> Page:
        """Read the page and the processes; memory is kept under the number of requests answered, if given."""
        async with self._reading:  # a page that was asked for earlier must not be compared with a later one
            page = await asyncio.to_thread(read_page, self.url)
            for name, (before, after) in fallen(self.page.counters, page.counters).items():
                self.fell.append(f"{name}: {before:g} → {after:g}")
            self.page = page
        self.peak_pages = max(self.peak_pages, page.get("drafter_pages_in_use"))
        if requests is not None:
            for name, process in self.processes.items():
                self.memory[name].append((requests, process.memory_info().rss))
        self._look_at_drafters()
        return page

    def drafter(self) -> psutil.Process | None:
        """The youngest drafter that is alive."""
        alive = [process for process in drafters_of(self.engine) if is_alive(process)]
        return alive[-1] if alive else None

    async def wait_for_drafter(self, timeout_s: float, other_than: psutil.Process | None) -> bool:
        """Whether a drafter, or one other than a dead one, is connected within the time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            drafter = self.drafter()
            if drafter is not None and drafter != other_than:
                page = await self.look()
                if page.get("drafter_connected") and self.drafter() == drafter:
                    return True
            await asyncio.sleep(0.2)
        return False

    def at_rest(self) -> dict[str, tuple[int, int]]:
        """Descriptors and threads by process."""
        return {name: (process.num_fds(), process.num_threads()) for name, process in self.processes.items()}

    def _look_at_drafters(self) -> None:
        """Count those that have died, and find those that are still there long after they should be gone."""
        now, drafters = time.monotonic(), [process.pid for process in drafters_of(self.engine)]
        zombies = (p.pid for p in self.engine.children() if p.status() == psutil.STATUS_ZOMBIE)
        found = {*drafters, *(pid for pid in zombies if pid in self._seen)}
        for pid in found:
            self._seen.setdefault(pid, None)
        for pid, since in list(self._seen.items()):
            if pid not in found:
                del self._seen[pid]
                self.dead.append(pid)
            elif not drafters or pid != drafters[-1]:
                self._seen[pid] = since = since or now
                if now - since > ORPHAN_S:
                    self.orphans[pid] = f"drafter {pid} for {now - since:.0f} s"


def server_processes(api: psutil.Process) -> dict[str, psutil.Process]:
    """The processes of a server that has a drafter, from the one that was started down to the drafter's worker."""
    (worker,) = filter(None, map(worker_of, api.children(recursive=True)))
    process, between = psutil.Process(worker), list[psutil.Process]()
    while process is not None and process != api:
        between.insert(0, process)
        process = process.parent()
    return {"API server": api} | ({"engine core": between[0]} if len(between) > 1 else {}) | {"worker": between[-1]}
