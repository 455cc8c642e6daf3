"""What a soak concludes: each breach is planted and found, and what looks like one is none."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import soak
import soak_faults as faults
import soak_verdicts as verdicts
from soak_faults import KINDS, Fault, Injector, gone, schedule
from soak_load import CHECKED, INVALID, UNCHECKED, Answer, Asked, Expected, Requests, faults_of
from soak_verdicts import (
    WARM_REQUESTS,
    Gap,
    Sample,
    account,
    events,
    fallen,
    memory_verdict,
    rest_verdict,
    slope_per_1000,
    stall_verdicts,
)

from vllm_ssd.link.process import HANG_S


def memory(slope_mb: float, requests: int = 20_000, seed: int = 0) -> list[tuple[int, int]]:
    """Resident bytes of a process that grows by `slope_mb` per 1,000 requests, with peaks and noise."""
    rng = random.Random(seed)
    samples = []
    for done in range(0, requests, 10):
        peak = rng.choice([0, 0, 0, 0, 30e6])
        samples.append((done, round(800e6 + slope_mb * 1e6 * done / 1000 + rng.gauss(0, 1e6) + peak)))
    return samples


@pytest.mark.parametrize("slope", [1.5, 4.0, 50.0])
def test_a_leak_of_memory_is_found(slope):
    assert slope_per_1000(memory(slope)) == pytest.approx(slope, abs=0.3)
    assert memory_verdict("worker", memory(slope)).holds is False


@pytest.mark.parametrize("slope", [-3.0, 0.0, 0.5])
def test_peaks_and_noise_are_no_leak(slope):
    assert memory_verdict("worker", memory(slope)).holds is True


@pytest.mark.parametrize("slope, holds", [(1.5, True), (6.0, False)])
def test_in_a_short_run_steps_of_an_allocator_are_no_leak(slope, holds):
    assert memory_verdict("worker", memory(slope, requests=WARM_REQUESTS + 2100)).holds is holds


def test_memory_is_judged_once_the_server_is_warm():
    warming = [(done, 700_000_000 + 400_000 * done) for done in range(0, WARM_REQUESTS - 10, 10)]
    flat = [(done + WARM_REQUESTS, resident) for done, resident in memory(0.0)]
    assert memory_verdict("worker", warming + flat).holds is True
    growing = [(done + WARM_REQUESTS, 1_000_000 * done) for done in range(0, 3000, 10)]
    assert memory_verdict("worker", warming + growing).holds is False


def test_a_short_run_does_not_judge_memory():
    assert memory_verdict("worker", memory(50.0, requests=WARM_REQUESTS + 1900)).holds is None
    assert memory_verdict("worker", []).holds is None
    assert memory_verdict("worker", [(5, 1), (5, 2)]).holds is None


def test_counters_that_fall_or_vanish_are_found():
    before = {"hits": 5.0, "misses": 3.0, "evictions": 2.0, "new": 0.0}
    found = fallen(before, {"hits": 5.0, "misses": 2.0, "new": 1.0, "more": 9.0})
    assert set(found) == {"misses", "evictions"}
    assert not fallen(before, before | {"hits": 6.0})


WINDOWS = [(10.0, 20.0), (40.0, 50.0)]


def stalled(gaps: list[Gap]) -> bool:
    """Whether the server waited longer under faults than without."""
    waited, computed = stall_verdicts(gaps, WINDOWS, seconds=100.0)
    assert computed.holds
    return not waited.holds


def test_a_stall_under_a_fault_is_the_drafter_s():
    assert stalled([Gap(15.0, 15.3)])
    assert stalled([Gap(19.9, 20.4)]) and stalled([Gap(9.8, 10.1)]), "it need only overlap"
    assert not stalled([Gap(15.0, 15.2)]), "short"
    assert not stalled([Gap(30.0, 31.0)]), "no fault was active"


def test_the_bound_of_a_stall_may_be_longer():
    gaps = [Gap(15.0, 15.9), Gap(45.0, 46.5)]
    for bound_s, found in ((0.25, 2), (1.0, 1), (2.0, 0)):
        waited, _ = stall_verdicts(gaps, WINDOWS, 100.0, bound_s)
        assert waited.found.startswith(f"{found} under faults") and waited.holds == (found == 0)


def test_a_stall_for_want_of_a_core_is_not():
    assert not stalled([Gap(15.0, 15.6, starved_s=0.4)])
    assert stalled([Gap(15.0, 15.6, starved_s=0.3)])
    assert "1 for want of a core" in stall_verdicts([Gap(15.0, 15.6, 0.4)], WINDOWS, 100.0)[1].found


def test_stalls_in_which_the_server_computed_are_counted_apart():
    def computed(at: float) -> Gap:
        return Gap(at, at + 0.5, computed_s=0.4)

    assert not stalled([computed(15.0)])
    assert stalled([Gap(15.0, 15.5, computed_s=0.2)]), "it computed for a part only"
    waited, busy = stall_verdicts([computed(11.0 + i) for i in range(9)], WINDOWS, 100.0)
    assert waited.holds and not busy.holds


def samples(*intervals: dict[str, tuple[float, float, float]]) -> list[Sample]:
    """One every 100 ms from 10 s on; what each process spent in each interval."""
    found = [Sample(10.0, dict.fromkeys(("worker", "engine core"), (0.0, 0.0, 0.0)))]
    for spent in intervals:
        times = {
            name: tuple(a + b for a, b in zip(before, spent.get(name, (0.0,) * 3)))
            for name, before in found[-1].times.items()
        }
        found.append(Sample(found[-1].at + 0.1, times))
    return found


def test_processes_that_take_turns_have_computed_all_along():
    worker, core = {"worker": (0.1, 0.0, 0.0)}, {"engine core": (0.1, 0.0, 0.0)}
    gap = account(10.0, 10.4, samples(worker, worker, core, core), [])
    assert gap.computed_s == pytest.approx(0.4) and gap.waited_s == pytest.approx(0.0)
    gap = account(10.0, 10.2, samples(worker | core, worker | core), [])
    assert gap.computed_s == pytest.approx(0.2), "not twice, at the same time"


def test_what_came_before_and_after_a_pause_does_not_count():
    busy, idle = {"worker": (0.1, 0.0, 0.0)}, {}
    gap = account(10.1, 10.3, samples(busy, idle, idle, busy, busy), [])
    assert gap.waited_s == pytest.approx(0.2) and gap.spent["worker"] == pytest.approx((0.0, 0.0, 0.0))
    gap = account(10.05, 10.15, samples(busy, idle), [])
    assert gap.computed_s == pytest.approx(0.05) and gap.waited_s == pytest.approx(0.05)


def test_no_core_a_disk_and_a_late_client_are_no_waiting():
    ready, disk = {"engine core": (0.0, 0.1, 0.0)}, {"worker": (0.0, 0.0, 0.1)}
    gap = account(10.0, 10.5, samples(ready, disk, {}, {}, {}), [(10.2, 10.3)])
    assert gap.starved_s == pytest.approx(0.3) and gap.waited_s == pytest.approx(0.2)
    both = {"engine core": (0.0, 0.1, 0.0), "worker": (0.1, 0.0, 0.0)}
    gap = account(10.0, 10.1, samples(both), [(9.0, 11.0)])
    assert gap.starved_s == pytest.approx(0.1) and gap.computed_s == pytest.approx(0.0), "no more than there was"
    assert "100 ms: 0 waited, 0 computed, 100 starved" in str(gap)


def test_a_pause_that_nobody_sampled_is_waiting():
    assert account(10.0, 10.5, [], []).waited_s == pytest.approx(0.5)


def test_stalls_that_also_come_without_faults_are_compared():
    calm = [Gap(60.0 + i, 60.5 + i) for i in range(8)]  # 8 in 80 s: 2 in 20 s, and twice their deviation
    assert not stalled([*calm, Gap(15.0, 15.5), Gap(16.0, 16.5)])
    assert stalled([*calm, *(Gap(11.0 + i / 2, 11.4 + i / 2) for i in range(10))])


def test_streams_that_pause_together_are_one_stall():
    assert events([Gap(1.0, 1.5), Gap(1.1, 1.8), Gap(1.6, 1.9), Gap(1.9, 2.2)]) == [Gap(1.1, 1.8), Gap(1.9, 2.2)]
    assert "1 under faults" in stall_verdicts([Gap(15.0, 15.5), Gap(15.0, 15.5)], WINDOWS, 100.0)[0].found


def test_descriptors_and_threads_are_compared_at_rest():
    assert rest_verdict("threads", "worker", 40, 42).holds
    assert not rest_verdict("threads", "worker", 40, 45).holds
    assert not verdicts.zero("orphans", ["drafter 7"]).holds and verdicts.zero("orphans", []).holds
    assert not verdicts.at_least("faults that hit", 0, 1).holds


def test_the_schedule_is_seeded_and_every_kind_comes_once_before_any_again():
    first = list(islice(schedule(3, KINDS), 400))
    assert first == list(islice(schedule(3, KINDS), 400)) != list(islice(schedule(4, KINDS), 400))
    for start in range(0, 400, len(KINDS)):
        assert Counter(fault.kind for fault in first[start : start + len(KINDS)]) == Counter(KINDS)
    hangs = [fault for fault in first if fault.kind == "hang"]
    assert all(1 <= fault.seconds <= 30 for fault in hangs) and 15 < sum(fault.hangs for fault in hangs) < 35
    assert not any(f.hangs for f in islice(schedule(3, KINDS, longest_hang_s=4.0), 100))
    assert not any(HANG_S - 0.5 < f.seconds < HANG_S + 0.5 for f in hangs), "neither one nor the other"


def test_requests_are_seeded_and_of_every_kind():
    requests, again = Requests(5, pool=28), Requests(5, pool=28)
    assert requests.pool == again.pool and Counter(a.kind for a in requests.pool) == dict.fromkeys(CHECKED, 4)
    assert len({asked.key for asked in requests.pool}) == 28
    stream = list(islice(requests.stream(0), 400))
    assert stream == list(islice(again.stream(0), 400)) != list(islice(requests.stream(1), 400))
    assert {asked.kind for asked in stream[: len(CHECKED) + len(UNCHECKED)]} == {*CHECKED, *UNCHECKED}
    assert all(asked.key for asked in stream if asked.kind in CHECKED)
    assert {asked.statuses for asked in stream if asked.kind == "invalid"} == {status for _, status in INVALID}


GREEDY = Asked("greedy", "completions", {"logprobs": 1}, key="greedy 0")
TEXT = Expected("one two three", "length", [-0.1, -0.2, -0.3], [5.0, 5.0, 5e-5], [0, 4, 8])


def answered(text: str = "one two three", finish: str = "length", logprobs=(-0.1, -0.2, -0.3), status: int = 200):
    return Answer(status, text, finish, [], [{}], list(logprobs))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (answered(), ""),
        (answered("one to three"), "text"),
        (answered("one two"), "text"),
        (answered("one two four"), "tie"),
        (answered("one two three "), "tie"),
        (answered(finish="stop"), "tie"),
        (answered(logprobs=[-0.1, -0.25, -0.3]), "text"),
        (answered(logprobs=[-0.1, -0.2]), "text"),
        (answered(status=500), "failed"),
    ],
)
def test_a_wrong_answer_is_found(answer, fault):
    assert faults_of(GREEDY, answer, TEXT)[0] == fault


def test_answers_that_are_not_compared_have_a_form():
    asked = Asked("n", "completions", {"n": 2})
    assert faults_of(asked, answered(), None)[0] == "text"
    asked = Asked("sampled", "completions", {"stream": True})
    assert faults_of(asked, answered(), None) == ("", "")
    assert faults_of(asked, answered(finish=""), None)[0] == "text"
    asked = Asked("invalid", "completions", {}, statuses=(400, 422))
    assert (
        faults_of(asked, answered(status=422), None) == ("", "") and faults_of(asked, answered(), None)[0] == "failed"
    )


LINK = """
import json, os, socket, subprocess, sys, time
ours, theirs = socket.socketpair()
for end in (ours, theirs):
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
code = "import time\\nwhile True: time.sleep(0.01); bytearray(1 << 26)"
child = lambda: subprocess.Popen(
    [sys.executable, "-c", code, "vllm_ssd.drafter", '{"parent_pid":%d,"tree_attention":false}' % os.getpid()],
    pass_fds=[theirs.fileno()],
)
drafter = child()
ours.setblocking(False)
print("ready", flush=True)
while True:
    if drafter.poll() is not None:
        drafter = child()
    try:
        ours.send(bytes(1000))
    except OSError:
        pass
    time.sleep(0.01)
"""


@pytest.fixture
def worker():
    """A stand-in for a worker: it starts a drafter again whenever it dies, and writes to a link that nobody reads."""
    process = subprocess.Popen([sys.executable, "-c", LINK], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    worker = psutil.Process(process.pid)
    yield worker
    children = worker.children()
    process.kill()
    for child in children:
        child.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the faults are done by Linux's means")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_hits_a_real_process_and_leaves_its_parent_alone(worker, kind):
    def limits(process: psutil.Process):
        return [process.rlimit(what) for what in (psutil.RLIMIT_AS, psutil.RLIMIT_FSIZE)]

    def buffers():
        sizes = []
        for end in faults.link_sockets(worker):
            with end:
                sizes.append(end.getsockopt(faults.socket.SOL_SOCKET, faults.socket.SO_SNDBUF))
        return sizes

    injector, before = Injector(worker, boot_s=0.1), (limits(worker), buffers(), worker.num_fds())
    (drafter,) = faults.drafters_of(worker)
    started = time.monotonic()
    seconds = {"memory": 2.0, "socket": 2.0}.get(kind, 0.4)  # in which the stand-in must have its turn
    assert asyncio.run(injector.inject(Fault(kind, seconds, 0.5, 0.0)))
    assert time.monotonic() - started < 20.0
    assert worker.is_running() and (limits(worker), buffers()) == before[:2]
    dies = kind in ("kill", "segv", "start", "memory", "disk")
    assert faults.is_alive(drafter) is not dies
    if not dies:
        assert drafter.status() != psutil.STATUS_STOPPED and limits(drafter) == limits(worker)
    deadline = time.monotonic() + 30
    while not faults.drafters_of(worker) or worker.num_fds() != before[2]:  # a drafter's start has some open
        assert time.monotonic() < deadline, worker.num_fds()
        time.sleep(0.02)


def test_a_process_that_stays_is_not_gone():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert not asyncio.run(gone(psutil.Process(process.pid), timeout_s=0.1))
        process.kill()
        assert asyncio.run(gone(psutil.Process(process.pid)))


def conclusions(**changes) -> dict[str, bool | None]:
    """The lines of a run without fault, with parts of what was found replaced."""
    names = ("API server", "worker")
    rest = dict.fromkeys(names, (30, 10))
    found = soak.Found(Counter(kill=2, hang=1), Counter(kill=2, hang=1), 1, WINDOWS, hits=900.0, seconds=100.0)
    found.rest = [rest, rest]
    load = SimpleNamespace(total=500, wrong=[], failed=[], ties=0, first_piece_s=0.2)
    watch = SimpleNamespace(
        dead=["1"], orphans={}, fell=[], gaps=[], peak_pages=3, memory={n: memory(0.0) for n in names}, processes=names
    )
    for name, value in changes.items():
        setattr(next(part for part in (found, load, watch) if hasattr(part, name)), name, value)
    lines = soak.verdicts(soak.parse(["--faults", "kill,hang"]), found, load, watch)
    return {line.what: line.holds for line in lines}


def test_a_run_without_fault_holds():
    assert all(conclusions().values())


@pytest.mark.parametrize(
    "changes",
    [
        {"hits": 0.0},
        {"broken": ["ConnectionRefusedError()"]},
        {"hit": Counter()},
        {"hit": Counter(kill=3)},
        {"total": 0},
        {"wrong": ["greedy 3"]},
        {"failed": ["500"]},
        {"gaps": [Gap(15.0, 15.5)]},
        {"fell": ["hits: 3 → 2"]},
        {"orphans": {7: "drafter 7"}},
        {"left": ["drafter 7"]},
        {"left_pages": ["3 pages"]},
        {"not_back": ["kill"]},
        {"memory": {"API server": memory(0.0), "worker": memory(3.0)}},
        {"rest": [dict.fromkeys(("API server", "worker"), (30, n)) for n in (10, 13)]},
        {"rest": [dict.fromkeys(("API server", "worker"), (n, 10)) for n in (30, 33)]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_breach_breaks_the_run(changes):
    assert False in conclusions(**changes).values()
