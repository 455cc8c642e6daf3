"""Run a server under load while its drafter is killed, stopped, starved and cut off; say what that did to anybody.

    python scripts/soak.py --minutes 10 --seed 1
    python scripts/soak.py --minutes 60 --faults kill,hang --runner v2 --json soak.json

A real `vllm serve` of the bundled pair answers mixed requests: greedy ones are compared with a server without
speculation. Faults follow a seeded schedule, the next one when the drafter is back from the one before. One table says
what was found. The exit status is 1 where a line of it does not hold, or when nothing was drafted or no fault hit.

It needs Linux, and the right to look into its own child processes (`ptrace`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
from rich.console import Console
from rich.table import Table
from soak_faults import KINDS, Injector, gone, is_alive, schedule
from soak_load import MAX_MODEL_LEN, PAIR, Load, Requests, expected_answers
from soak_verdicts import (
    ORPHAN_S,
    STALL_S,
    Verdict,
    at_least,
    memory_verdict,
    rest_verdict,
    stall_verdicts,
    stalls,
    zero,
)
from soak_watch import RunDelay, Watch, server_processes

SERVER = Path(__file__).with_name("soak_server.py")
START_S = 300.0
BACK_S = 180.0
"""A drafter is connected again so long after a fault, at the latest."""
SETTLE_S = 0.5
"""What still counts as under a fault after it."""
WARM_S = 5.0
CALM = 0.3
"""The rest after a fault, as a part of what it took: stalls under faults are compared with those of calm times."""
MOST = 3.0
"""A run goes on until enough kinds of fault have hit, for so many times the minutes asked for."""
POOL = 70
MAX_BATCHED_TOKENS = 64
"""oneDNN compiles and keeps kernels for each number of tokens in a step, in half a second each: a few are soon all."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "SOAK_BACKOFF_S": "0.2,0.5",
    "TORCHDYNAMO_DISABLE": "1",
}
"""vLLM has torch compile parts of its sampler for each new number of rows, which stops all streams for a second."""
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
SPECULATION = {
    "method": "ssd",
    "model": str(PAIR / "drafter"),
    "num_speculative_tokens": 5,
    "adaptive": False,
    "branch_budget": 12,
    "kv_cache_memory": "64MiB",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
console = Console(width=140 if not sys.stdout.isatty() else None)


class Inconclusive(RuntimeError):
    """The soak could not be run."""


class Server:
    """One `vllm serve` of the bundled target, in a process group of its own, with a log."""

    def __init__(self, folder: Path, name: str, options: argparse.Namespace, speculates: bool) -> None:
        self.log = folder / f"{name}.log"
        template = folder / "template.jinja"
        template.write_text(TEMPLATE)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(SERVER), "serve", str(PAIR / "target"), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--served-model-name", "target", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(2 * options.clients)]
        command += ["--kv-cache-memory-bytes", "64M", "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)]
        command += ["--chat-template", str(template)]
        command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--disable-uvicorn-access-log"]
        if speculates:
            command += ["--speculative-config", json.dumps(SPECULATION)]
        environment = os.environ | ENVIRONMENT | (V2 if options.runner == "v2" else {})
        environment |= {"SOAK_FORKED": "1"} if options.forked and speculates else {}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    async def wait_until_ready(self) -> None:
        """Return when it answers; raises Inconclusive when it does not."""
        deadline = time.monotonic() + START_S
        while not await asyncio.to_thread(self._answers):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Inconclusive(f"the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            await asyncio.sleep(0.3)

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    def end(self, others: list[psutil.Process]) -> None:
        """Kill it with its children and `others`."""
        processes = list(others)
        with suppress(psutil.NoSuchProcess):
            processes += psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@dataclass
class Found:
    """What a run has seen, beside what `Load` and `Watch` keep."""

    started: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    windows: list[tuple[float, float]] = field(default_factory=list)  # of each fault that was started
    kinds: list[str] = field(default_factory=list)  # and its kind
    not_back: list[str] = field(default_factory=list)
    hits: float = 0.0  # rounds with drafts of the drafter's, since faults began
    begun: float = 0.0
    seconds: float = 0.0
    rest: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    left_pages: list[str] = field(default_factory=list)
    restarts: float = 0.0
    left: list[str] = field(default_factory=list)  # drafters that outlived the server
    ended_by: str = ""
    broken: list[str] = field(default_factory=list)  # why the run ended too early


async def soak(options: argparse.Namespace, folder: Path) -> tuple[Found, Load, Watch]:
    """Start both servers, and run for the time that is asked for."""
    if (task := asyncio.current_task()) is not None:
        _end_early(options, task)
    requests = Requests(options.seed, options.pool)
    plain = Server(folder, "target", options, speculates=False)
    server = Server(folder, "ssd", options, speculates=True)
    processes: list[psutil.Process] = []
    try:
        await plain.wait_until_ready()
        expected = await expected_answers(plain.url, requests.pool)
        plain.end([])
        await server.wait_until_ready()
        found = server_processes(psutil.Process(server.process.pid))
        processes += found.values()
        with RunDelay(found) as delay:
            watch = Watch(server.url, delay, found)
            load = Load(server.url, requests, expected, watch.gap)
            tasks = [asyncio.create_task(load.client(number)) for number in range(options.clients)]
            tasks.append(asyncio.create_task(delay.watch_client()))
            result = Found()
            try:
                await _run(options, result, load, watch)
            except (OSError, psutil.Error) as error:  # the server does not answer, or is gone
                result.broken.append(repr(error))
            finally:
                result.broken += [f"a client: {task.exception()!r}" for task in tasks if task.done()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return result, load, watch
    finally:
        plain.end([])
        server.end(processes)


def _end_early(options: argparse.Namespace, task: asyncio.Task) -> None:
    """Have a first SIGTERM or Ctrl-C end the run after the fault that is under way, and a second one end it at once."""

    def end() -> None:
        if options.minutes == 0:
            task.cancel()
        options.minutes = options.kinds = 0

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)


async def _run(options: argparse.Namespace, found: Found, load: Load, watch: Watch) -> None:
    injector = Injector(watch.engine)
    load.go()
    warm_until = time.monotonic() + WARM_S
    while time.monotonic() < warm_until or load.total < 12 * options.clients:
        await asyncio.sleep(0.1)
    await _rest(load, watch, found)
    load.go()
    looking = asyncio.create_task(_look(load, watch))
    hits = watch.page.get("hits_total")
    found.begun = time.monotonic()
    watch.gaps.clear()
    for fault in schedule(options.seed, options.faults, options.longest_hang):
        last = found.windows[-1][1] - found.windows[-1][0] if found.windows else 0.0
        await asyncio.sleep(min(max(fault.pause_s, CALM * last), options.longest_pause))
        over = (time.monotonic() - found.begun) / max(60 * options.minutes, 1e-9)
        if over > 1 and (kinds_hit(options, found) >= options.kinds or over > MOST) or looking.done():
            break
        drafter, start = watch.drafter(), time.monotonic()
        hit = await injector.inject(fault)
        after, lost = time.monotonic(), drafter is not None and not is_alive(drafter)
        found.started[fault.kind] += 1
        found.hit[fault.kind] += hit
        found.hangs += hit and fault.hangs
        if not await watch.wait_for_drafter(BACK_S, drafter if lost else None):
            found.not_back.append(f"{fault.kind}, {BACK_S:.0f} s after it")
        elif lost and fault.kind in ("kill", "segv"):
            injector.learn(time.monotonic() - after)
        found.windows.append((start, time.monotonic() + SETTLE_S))
        found.kinds.append(fault.kind)
        if options.verbose:
            took = time.monotonic() - start
            console.print(f"{start - found.begun:7.1f} s {fault.kind:7} {'hit' if hit else 'no hit'}, {took:.1f} s")
    found.seconds = time.monotonic() - found.begun
    looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking
    await _rest(load, watch, found)
    found.hits = watch.page.get("hits_total") - hits
    found.restarts = watch.page.get("restarts_total")
    await _end(options, watch, found)


async def _look(load: Load, watch: Watch) -> None:
    while True:
        await watch.look(load.total)
        await asyncio.sleep(1.0)


async def _rest(load: Load, watch: Watch, found: Found) -> None:
    """Stop the load and take stock: nothing may be open on the drafter, and processes hold what they hold at rest."""
    await load.rest()
    await watch.wait_for_drafter(BACK_S, None)
    deadline = time.monotonic() + 5.0
    while (pages := (await watch.look()).get("drafter_pages_in_use")) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    if pages:
        found.left_pages.append(f"{pages:.0f} pages in use 5 s after the last request")
    await asyncio.sleep(1.0)
    await watch.account_all()
    found.rest.append(watch.at_rest())


async def _end(options: argparse.Namespace, watch: Watch, found: Found) -> None:
    """Kill one process of the server, with a drafter that runs or is stopped: no drafter may outlive it for long."""
    rng = random.Random(f"{options.seed}/end")
    drafter = watch.drafter()
    # A stopped one is killed by the kernel when its parent ends, which is not the worker where it was forked.
    if rng.random() < 0.5 and drafter is not None and not options.forked:
        drafter.send_signal(signal.SIGSTOP)
        found.ended_by = "stopped drafter, "
    name = rng.choice(sorted(watch.processes))
    found.ended_by += f"{name} killed"
    watch.processes[name].kill()
    if drafter is not None and not await gone(drafter, ORPHAN_S):
        found.left.append(f"drafter {drafter.pid}, {ORPHAN_S:.0f} s after the {name} was killed")


def kinds_hit(options: argparse.Namespace, found: Found) -> int:
    """Kinds of fault that have hit at least once."""
    return sum(found.hit[kind] > 0 for kind in set(options.faults))


def verdicts(options: argparse.Namespace, found: Found, load: Load, watch: Watch) -> list[Verdict]:
    """The table's lines."""
    hits = found.hit.total()
    lines = [
        at_least("requests answered", load.total, 1),
        at_least("rounds with drafts of the drafter's", found.hits, 1),
        at_least("faults that hit", hits, 1),
        at_least("kinds of fault that hit", kinds_hit(options, found), options.kinds),
        Verdict("drafter deaths, those in a boot included", f"{len(watch.dead)}", "", True),
        Verdict("drafters that came up after the first", f"{found.restarts:.0f}", "", True),
        Verdict("hangs beyond the target's patience", f"{found.hangs}", "", True),
        zero("ends before the time", found.broken),
        zero("wrong answers", load.wrong),
        Verdict("ties broken differently", f"{load.ties}", "", True),
        zero("requests that failed", load.failed),
        *stall_verdicts(watch.gaps, found.windows, found.seconds, options.longest_stall),
        Verdict("longest time to a first piece", f"{load.first_piece_s:.2f} s", "", True),
        zero("drafters that did not come back", found.not_back),
        zero("drafters that outlived their death", list(watch.orphans.values())),
        zero(f"drafters that outlived the server ({found.ended_by})", found.left),
        zero("sessions and pages left on the drafter", found.left_pages),
        Verdict("most pages in use", f"{watch.peak_pages:.0f}", "", True),
        zero("counters that fell", watch.fell),
    ]
    for name in watch.processes:
        lines.append(memory_verdict(name, watch.memory[name]))
        for i, what in enumerate(("descriptors", "threads")):
            if len(found.rest) > 1:
                lines.append(rest_verdict(what, name, found.rest[0][name][i], found.rest[-1][name][i]))
    return lines


def show(found: Found, load: Load, watch: Watch, lines: list[Verdict]) -> None:
    """The table, what the load and the faults were, and where the time of each stall went."""
    table = Table("what", "found", "bound", "", title=f"{found.seconds:.0f} s under load")
    for line in lines:
        mark = {True: "[green]holds" if line.bound else "", False: "[red]BREACH", None: "too short to tell"}[line.holds]
        table.add_row(line.what, line.found[:300], line.bound, mark)
    console.print(table)
    console.print("load: " + ", ".join(f"{number} {kind}" for kind, number in sorted(load.answered.items())))
    console.print("faults: " + ", ".join(f"{kind} {found.hit[kind]} of {n}" for kind, n in found.started.items()))
    for gap in (gap for gap in stalls(watch.gaps) if gap.served_s > STALL_S):
        under = [kind for kind, window in zip(found.kinds, found.windows) if gap.overlaps([window])]
        console.print(f"stall at {gap.start - found.begun:.1f} s, {' and '.join(under) or 'no fault'}: {gap}")


def report(options: argparse.Namespace, found: Found, load: Load, watch: Watch, lines: list[Verdict]) -> dict[str, Any]:
    """All of it, for a machine."""
    return {
        "options": {key: str(value) for key, value in vars(options).items()},
        "seconds": found.seconds,
        "faults": dict(found.started),
        "faults_hit": dict(found.hit),
        "hangs": found.hangs,
        "deaths": watch.dead,
        "load": dict(load.answered),
        "wrong": load.wrong,
        "failed": load.failed,
        "gaps": [asdict(gap) for gap in watch.gaps],
        "begun": found.begun,
        "windows": found.windows,
        "kinds": found.kinds,
        "memory": watch.memory,
        "lines": [asdict(line) for line in lines],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="under load with faults, after the start")
    parser.add_argument("--faults", default=",".join(KINDS), help="kinds of faults, separated by commas")
    parser.add_argument("--kinds", type=int, default=5, help="fail unless so many kinds have hit, or all there are")
    parser.add_argument("--longest-hang", type=float, default=30.0, help="longest SIGSTOP in seconds")
    parser.add_argument("--longest-pause", type=float, default=30.0, help="longest rest before a fault in seconds")
    parser.add_argument("--longest-stall", type=float, default=STALL_S, help="longest pause of a stream in seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1", help="vLLM's model runner; v2 is interpreted")
    parser.add_argument(
        "--forked",
        action="store_true",
        help="drafters start in a second, forked from a process with vLLM; not with disk",
    )
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pool", type=int, default=POOL, help="different greedy requests")
    parser.add_argument("--json", type=Path, help="write everything that was found to this file")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs; a temporary one by default")
    parser.add_argument("--verbose", action="store_true", help="a line for each fault")
    options = parser.parse_args(arguments)
    options.faults = tuple(options.faults.split(","))
    if unknown := set(options.faults) - set(KINDS):
        parser.error(f"no kind of fault: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if options.forked and "disk" in options.faults:
        parser.error("--forked: a drafter that is forked does not inherit the server's limits; leave out disk")
    if options.longest_stall < STALL_S:
        parser.error(f"--longest-stall: pauses below {STALL_S} s are not looked at")
    options.kinds = min(options.kinds, len(set(options.faults)))
    return options


@contextmanager
def log_folder(given: Path | None):
    """The folder for logs, which is removed unless it was given."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        yield Path(folder)


def main() -> int:
    """Run, and say what was found."""
    options = parse()
    with log_folder(options.logs) as folder:
        try:
            found, load, watch = asyncio.run(soak(options, folder))
        except Inconclusive as error:
            console.print(str(error), markup=False)
            return 1
        except asyncio.CancelledError:
            return 1
    lines = verdicts(options, found, load, watch)
    show(found, load, watch, lines)
    if options.json:
        options.json.write_text(json.dumps(report(options, found, load, watch, lines), indent=1))
    return int(any(line.holds is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
