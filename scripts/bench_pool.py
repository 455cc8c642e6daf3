"""What it costs to have a drafter elsewhere: the links themselves, and an engine with two drafters of either kind.

    python scripts/bench_pool.py links
    git worktree add /tmp/before HEAD~1 && python scripts/bench_pool.py links --baseline /tmp/before
    python scripts/bench_pool.py drafters

`links`: round trips of a Step and the Push that answers it, with encoding, checking of sizes and decoding, to a process
of its own: over a socketpair, plain TCP and mutual TLS on loopback. `drafters`: tokens per second of a target with two
drafters of its own, and with two of `vllm-ssd drafter` on loopback. Both targets have the same cores, and both pairs of
drafters have the others. The target is the bundled one, widened until two drafters are in time on one core. K and the
branches are fixed: only the links differ. Runs of both sides take turns, and each pair of neighbours gives one ratio:
what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from bench_prompts import held_out_prompts
from bench_report import environment, spread
from bench_systems import (
    MAX_PAIR_LEN,
    PAIR,
    add_cores,
    choose_cores,
    console,
    drafter_cores,
    on_cpu,
    run_script,
    start_pair,
)
from resize_model import widen
from rich.table import Table

from vllm_ssd.link.placement import share
from vllm_ssd.planning.engine_host import EngineProcess, serve, threads_on

SIZES = {"0.8 kB": 1, "62 kB": 120}
"""Drafts whose proposals of 64 tokens a push carries."""
SUPPORT = 64
KINDS = ("socketpair", "TCP", "TLS")
GOALS = {"TLS / TCP at 62 kB": 2.5, "socketpair / before at 62 kB": 1.05, "own / elsewhere, tokens per second": 1.05}
"""Medians that are not to be exceeded."""
NUM_DRAFTERS = 2
SIZES_OF_DRAFTERS = {"dtype": "float32", "kv_cache_memory": "64MiB", "fan_out": 2}
"""Keys that drafters of both kinds have; a fixed fan-out, so that none learns to do with less."""
MAX_LATE = 0.1
"""Of the outcomes of the server's own drafters; where more are late, the machine is what is measured."""
WORKER, LINK = "--worker", "--link"
START_S = 300.0


def push_of(num_drafts: int) -> Any:
    """A push of one sampled request."""
    import numpy as np

    from vllm_ssd.link.protocol import Push, SpeculationBlock

    outcomes = np.zeros((num_drafts, 2), np.int32)
    outcomes[:, 1] = np.arange(num_drafts)
    drafts = np.arange(num_drafts, dtype=np.int32)
    block = SpeculationBlock("request", 1, 100, 0, outcomes.tobytes(), drafts.tobytes(), True)
    ids = np.arange(num_drafts * SUPPORT, dtype=np.int32).tobytes()
    q = np.full((num_drafts, SUPPORT), 1 / SUPPORT, np.float32).tobytes()
    return Push([block], [], None, SUPPORT, ids, q)


class Plain:
    """A TCP socket that is no more than that."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


@contextmanager
def peer(kind: str, credential: Path) -> Iterator[Any]:
    """The target's end of a link to a process that answers each Step with the Push of as many drafts as it wants."""
    from vllm_ssd.link.credential import tls_context
    from vllm_ssd.link.tcp import TlsStream, connect, tuned
    from vllm_ssd.link.transport import ProcessTransport, TransportClosed

    listener = socket.create_server(("127.0.0.1", 0))
    pair = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            stream: Any = pair[1]
            pair[0].close()
            if kind != "socketpair":
                stream = Plain(tuned(listener.accept()[0]))
            if kind == "TLS":
                stream = TlsStream(stream._socket, tls_context(credential, is_server=True), server_side=True)
                while not stream.shake_hands():
                    select.select([stream], [], [])
            transport = ProcessTransport(stream, "drafter")
            pushes = {num_drafts: push_of(num_drafts) for num_drafts in SIZES.values()}
            while True:
                for step in transport.poll(None):
                    transport.send(pushes[step.num_speculative_tokens])
                while transport.pending_bytes:
                    transport.poll(0.0)
        except TransportClosed:
            pass
        finally:
            os._exit(0)
    pair[1].close()
    if kind == "socketpair":
        stream = pair[0]
    elif kind == "TCP":
        stream = Plain(tuned(socket.create_connection(listener.getsockname())))
    else:
        stream = connect(listener.getsockname(), tls_context(credential, is_server=False))
    transport = ProcessTransport(stream, "target")
    try:
        yield transport
    finally:
        transport.close()
        listener.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def round_trips(transport: Any, num_drafts: int, count: int) -> list[float]:
    """Seconds of each of `count` round trips."""
    from vllm_ssd.link.protocol import Close, Step

    step, seconds = Step([Close("request")], num_drafts), []
    for _ in range(count):
        started = time.perf_counter()
        transport.send(step)
        while not transport.poll(1.0):
            pass
        seconds.append(time.perf_counter() - started)
    return seconds


def time_links(kinds: Sequence[str], blocks: int, count: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By kind and size, p50 and p99 of each block of round trips, in µs; the kinds take turns."""
    from vllm_ssd.link.credential import make_credential

    found: dict[str, dict[str, list[dict[str, float]]]] = {kind: {size: [] for size in SIZES} for kind in kinds}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        credential = Path(folder) / "ssd.pem"
        make_credential(credential)
        links = {kind: stack.enter_context(peer(kind, credential)) for kind in kinds}
        for size, num_drafts in SIZES.items():
            for block in range(blocks + 1):
                for kind, transport in links.items():
                    times = percentiles(round_trips(transport, num_drafts, count))
                    if block:  # the first warms up
                        found[kind][size].append(times)
    return found


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99, in µs."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {"p50": 1e6 * cuts[49], "p99": 1e6 * cuts[98]}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of neighbours; raises ValueError where there are fewer than two, or not as many."""
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} runs give no ratios")
    return spread([mine / other for mine, other in zip(ours, theirs)])


def verdicts(found: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Whether the medians of the ratios that have a goal reach it."""
    return {name: found[name]["median"] <= goal for name, goal in GOALS.items() if name in found}


def links(args: argparse.Namespace) -> dict[str, Any]:
    """The part `links`."""
    times = time_links(KINDS, args.blocks, args.count)
    table = Table("link", *(f"{size}, p50 / p99 µs" for size in SIZES))
    for kind, by_size in times.items():
        cells = []
        for blocks in by_size.values():
            middle = {name: spread([block[name] for block in blocks])["median"] for name in ("p50", "p99")}
            cells.append(f"{middle['p50']:.0f} / {middle['p99']:.0f}")
        table.add_row(kind, *cells)
    console.print(table)
    p50 = {kind: [block["p50"] for block in times[kind]["62 kB"]] for kind in KINDS}
    found = {"TLS / TCP at 62 kB": ratios(p50["TLS"], p50["TCP"])}
    if args.baseline:
        now, before = [], []
        for _ in range(args.blocks):
            now.append(socketpair_of(Path(__file__).parents[1], args.count))
            before.append(socketpair_of(args.baseline, args.count))
        found["socketpair / before at 62 kB"] = ratios(now, before)
    return {"times_us": times, "ratios": found}


def socketpair_of(checkout: Path, count: int) -> float:
    """p50 of a socketpair with the package of a checkout, in µs."""
    paths = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, LINK, str(count)], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE
    )
    done.check_returncode()
    return json.loads(done.stdout)


class PairEngine:
    """The process of one engine."""

    def start(self, target: str, speculative: dict[str, Any]) -> None:
        """Start a target with the bundled drafter and keys of speculative_config."""
        from vllm_ssd.compat.target import measure

        config = {"method": "ssd", "model": str(PAIR / "drafter"), "num_speculative_tokens": 5, "on_miss": "skip"}
        self._engine = start_pair(config | {"adaptive": False} | speculative, Path(target))
        self._counts = measure.proposer(self._engine)._metrics.counts

    def decode(self, prompts: list[list[int]], max_tokens: int) -> dict[str, float]:
        """Tokens per second of all prompts at once, and the shares of outcomes that hit and that came too early."""
        from vllm import SamplingParams

        before, started = dict(self._counts), time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self._engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        seconds = time.perf_counter() - started
        hits, misses, late = (self._counts[name] - before[name] for name in ("hits", "misses", "late"))
        outcomes = max(hits + misses + late, 1)
        rate = len(prompts) * max_tokens / seconds
        return {"tokens_per_s": rate, "hit_rate": hits / outcomes, "late_rate": late / outcomes}


@contextmanager
def listening(folder: Path, key: Path, cores: Sequence[int]) -> Iterator[list[str]]:
    """The addresses of drafters that `vllm-ssd drafter` runs, which start together and share `cores` as own ones do."""
    command = [str(Path(sys.executable).with_name("vllm-ssd")), "drafter", "--model", str(PAIR / "drafter")]
    command += ["--key", str(key), "--max-num-seqs", "8"]
    logs = [folder / f"drafter {index}.log" for index in range(NUM_DRAFTERS)]
    with ExitStack() as ports:
        free = [ports.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in logs]
        addresses = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in free]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for index, (address, log) in enumerate(zip(addresses, logs)):
            own = drafter_cores([(), share(cores, index, NUM_DRAFTERS)])
            config = json.dumps(SIZES_OF_DRAFTERS | {"max_model_len": MAX_PAIR_LEN} | own)
            arguments = [*command, "--config", config, "--listen", address]
            with log.open("w") as file:
                processes.append(subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + START_S
        for process, log in zip(processes, logs):
            while "listens on" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"bench_pool: a drafter has not come up:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
        yield addresses
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def drafters(args: argparse.Namespace) -> dict[str, Any]:
    """The part `drafters`."""
    from vllm_ssd.link.credential import make_credential

    pieces = held_out_prompts(seed=0)
    prompts = [next(pieces)[:64] for _ in range(args.batch_size)]
    runs: dict[str, list[dict[str, float]]] = {"own": [], "elsewhere": []}
    cores, others = choose_cores(args.cores, on_cpu())
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        key = folder / "ssd.pem"
        make_credential(key)
        widen(PAIR / "target", folder / "target", args.intermediate_size, dtype="float32")
        addresses = stack.enter_context(listening(folder, key, others))
        keys = {
            "own": {"num_drafters": NUM_DRAFTERS} | SIZES_OF_DRAFTERS | drafter_cores([(), others]),
            "elsewhere": {"drafters": addresses, "drafter_key": str(key), "min_drafters": NUM_DRAFTERS, "fan_out": 2},
        }
        engines: dict[str, EngineProcess] = {}
        for side, speculative in keys.items():
            log = folder / f"{side}.log"
            engines[side] = EngineProcess(
                [str(Path(__file__)), WORKER],
                log,
                environment={"VLLM_LOGGING_LEVEL": "WARNING"} | threads_on(cores),
                name=side,
            )
            stack.callback(engines[side].close)
            engines[side].send("start", target=str(folder / "target"), speculative=speculative)
        for engine in engines.values():
            engine.receive(START_S)
            engine.pin(cores)
        for run in range(args.blocks + 1):
            for side, engine in engines.items():
                result = engine.call("decode", prompts=prompts, max_tokens=args.tokens)
                if run:
                    runs[side].append(result)
    middles = medians(runs)
    for side, middle in middles.items():
        rates = f"hit rate {middle['hit_rate']:.2f}, late {middle['late_rate']:.2f}"
        console.print(f"{side:10} {middle['tokens_per_s']:.0f} tokens/s, {rates}")
    check_hidden(middles)
    speed = {side: [result["tokens_per_s"] for result in results] for side, results in runs.items()}
    return {"runs": runs, "ratios": {"own / elsewhere, tokens per second": ratios(speed["own"], speed["elsewhere"])}}


def medians(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """By side, the median of each number over its runs."""
    return {
        side: {name: spread([result[name] for result in results])["median"] for name in results[0]}
        for side, results in runs.items()
    }


def check_hidden(middle: dict[str, dict[str, float]]) -> None:
    """Raise SystemExit where drafters of a kind never hit, or the server's own have too little of the machine."""
    for side, rates in middle.items():
        if not rates["hit_rate"]:
            raise SystemExit(f"bench_pool: inconclusive: no hits with drafters of kind {side!r}")
    late = middle["own"]["late_rate"]
    if late > MAX_LATE:
        raise SystemExit(
            f"bench_pool: inconclusive: {late:.0%} of the outcomes come before a block of the server's own drafters; "
            "give the target a larger --intermediate-size, or the drafters more --cores"
        )


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"links": links, "drafters": drafters}


def main() -> None:
    """Measure, print ratios and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--blocks", type=int, default=20, help="of round trips, or runs of each engine")
    parser.add_argument("--count", type=int, default=300, help="round trips of a block")
    parser.add_argument(
        "--baseline", type=Path, metavar="CHECKOUT", help="whose socketpair is compared with this one's"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--intermediate-size", type=int, default=40960, help="of the widened target")
    add_cores(parser)
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    result = {part: PARTS[part](args) for part in args.parts} | {"environment": environment(sys.argv)}
    for part in args.parts:
        found = result[part]["ratios"]
        result[part]["reached"] = verdicts(found)
        for name, ratio in found.items():
            goal = f"goal {GOALS[name]:g}: {'reached' if result[part]['reached'][name] else 'MISSED'}"
            between = f"quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f}, all {ratio['min']:.2f} to {ratio['max']:.2f}"
            console.print(f"{name}: {ratio['median']:.2f} ({between}); {goal}", markup=False)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        del sys.argv[1]
        serve(PairEngine)
    elif sys.argv[1:2] == [LINK]:
        (times,) = time_links(["socketpair"], 1, int(sys.argv[2])).values()
        print(times["62 kB"][0]["p50"])
    else:
        run_script(main)
