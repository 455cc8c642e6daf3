"""What a soak sees of a running server: its processes from /proc, and its metrics page."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families
from soak_faults import drafters_of, is_alive, worker_of
from soak_verdicts import CLIENT, ORPHAN_S, STALL_S, Gap, Sample, account, fallen

TICK_S = 0.02
KEPT_S = 120.0
"""Longer than a request may take."""
SETTLED_S = 0.1
"""So long after a pause the client knows how late it was itself."""


class RunDelay:
    """How long main threads of the server ran, were ready while no core was free, and were at the disk; and how late
    this client was.

    A thread samples /proc/PID/schedstat, which counts nanoseconds, and the state, while the context lasts.
    """

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._pids = {name: process.pid for name, process in processes.items()} | {CLIENT: os.getpid()}
        self._samples: deque[Sample] = deque(maxlen=round(KEPT_S / TICK_S))
        self._late: deque[tuple[float, float]] = deque(maxlen=round(KEPT_S / TICK_S))
        self._at_disk = dict.fromkeys(self._pids, 0.0)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> RunDelay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    @property
    def sampled_until(self) -> float:
        """When the last sample was taken."""
        return self._samples[-1].at if self._samples else -math.inf

    def gap(self, start: float, end: float) -> Gap:
        """A pause of a stream before that, and what the processes did meanwhile."""
        return account(start, end, self._samples.copy(), self._late.copy())

    async def watch_client(self) -> None:
        """Measure how late the client's event loop is, for as long as the task lives."""
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            if (now := time.monotonic()) - due > TICK_S:
                self._late.append((due, now))

    def _sample(self) -> None:
        last = time.monotonic()
        while not self._ends.wait(TICK_S):
            now = time.monotonic()
            self._samples.append(Sample(now, self._times(now - last)))
            last = now

    def _times(self, passed_s: float) -> dict[str, tuple[float, float, float]]:
        """Seconds on a core, without one, and at the disk, since each process started."""
        times = {}
        for name, pid in self._pids.items():
            with contextlib.suppress(OSError, ValueError):
                ran, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D":
                    self._at_disk[name] += passed_s
                times[name] = (ran / 1e9, waited / 1e9, self._at_disk[name])
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
        self._pauses: list[tuple[float, float]] = []
        self.fell: list[str] = []
        self.orphans: dict[int, str] = {}
        self.dead: list[int] = []  # process ids of drafters
        self.peak_pages = 0.0
        self._delay = delay
        self._reading = asyncio.Lock()
        self._seen: dict[int, float | None] = {}  # drafters, and since when each should be gone

    def gap(self, start: float, end: float) -> None:
        """Take note of a pause between two pieces of a stream; only long ones are kept."""
        if end - start > STALL_S:
            self._pauses.append((start, end))

    def account(self) -> None:
        """Account for the pauses noted so far, but for those that ended after the last sample."""
        until = self._delay.sampled_until - SETTLED_S
        self.gaps += [self._delay.gap(start, end) for start, end in self._pauses if end < until]
        self._pauses = [pause for pause in self._pauses if pause[1] >= until]

    async def account_all(self) -> None:
        """Account for all pauses noted so far."""
        self.account()
        while self._pauses:
            await asyncio.sleep(TICK_S)
            self.account()

    async def look(self, requests: int | None = None) -> Page:
        """Read the page and the processes; memory is kept under the number of requests answered, if given."""
        async with self._reading:  # a page that was asked for earlier must not be compared with a later one
            page = await asyncio.to_thread(read_page, self.url)
            for name, (before, after) in fallen(self.page.counters, page.counters).items():
                self.fell.append(f"{name}: {before:g} → {after:g}")
            self.page = page
        self.account()
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
