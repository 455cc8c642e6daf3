"""Decode throughput of plain vLLM, stock `draft_model`, SSD and SSD's ceiling, interleaved on two cores.

    python scripts/bench_decode.py --out results            # everything, about an hour and a half
    python scripts/bench_decode.py --out results --quick    # one point with a dear drafter, a few minutes

Every system is an engine in a process of its own, all on one core, SSD's drafter on the other. They are started
together and asked in turn, so that whatever changes on the machine hits them alike; ratios are taken within a round
of turns. Idle ones are stopped: the network threads of an idle vLLM engine take 2 % of a core. The ceiling is SSD's
own drafts of that round, replayed at no cost; where text is sampled it is not defined. A target of any cost comes
from widening the bundled one, a drafter of any cost from deepening.

*Dear* means that stock speculation at its best K spends nearly as long drafting as verifying, and that K + 1 of the
drafter's steps just fit into one verification; *cheap* is one fifth of that. What the sizes below give on this
machine is measured first and printed.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from bench_report import Round, environment, plot, print_costs, print_point, summarise
from bench_worker import MAX_NUM_SEQS, PROMPT_TOKENS, Request, System, Turn, serve
from resize_model import deepen, widen
from rich.console import Console
from tokenizers import Tokenizer
from train_pair import read_sources

PAIR = Path(__file__).resolve().parents[1] / "tests" / "assets" / "pair"
STARTS_AT_ONCE = 2
STARTUP_TIMEOUT_S = 300
COST_ROUNDS = 3
COST_TOKENS = 64
LOG_LINES = 25

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


class WorkerFailed(RuntimeError):
    """A worker did not start, or ended; the message holds its last log lines."""


class Fleet:
    """All systems of one drafter, each in its process, which is stopped unless it has been asked."""

    def __init__(self, systems: Sequence[System], dtype: str, core: int, folder: Path) -> None:
        self.systems = list(systems)
        self._dtype, self._core, self._folder = dtype, core, folder
        self._connections: dict[str, Connection] = {}
        self._pids: dict[str, list[int]] = {}
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def start(self) -> None:
        """Start all workers, a few at a time on all cores; each pins itself once it is up."""
        spawn = multiprocessing.get_context("spawn")
        waiting: list[str] = []
        for system in self.systems:
            if len(waiting) == STARTS_AT_ONCE:
                self._wait_until_up(waiting.pop(0))
            ours, theirs = spawn.Pipe()
            log = self._log(system.name)
            process = spawn.Process(target=serve, args=(theirs, system, self._dtype, self._core, log))
            process.start()
            theirs.close()
            self._connections[system.name] = ours
            self._processes.append(process)
            waiting.append(system.name)
        for name in waiting:
            self._wait_until_up(name)

    def ask(self, name: str, request: Request) -> Turn:
        """Let one system generate while all others are stopped."""
        self._signal(name, signal.SIGCONT)
        try:
            self._connections[name].send(request)
        except OSError:
            raise self._failure(name, "ended") from None
        turn = self._receive(name, None)
        self._pids[name] = turn.pids
        self._signal(name, signal.SIGSTOP)
        return turn

    def close(self) -> None:
        """End all workers; SSD's take their drafters along."""
        for name in self._pids:
            self._signal(name, signal.SIGCONT)
        for connection in self._connections.values():
            connection.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def _wait_until_up(self, name: str) -> None:
        self._pids[name] = self._receive(name, STARTUP_TIMEOUT_S)
        self._signal(name, signal.SIGSTOP)

    def _signal(self, name: str, number: signal.Signals) -> None:
        for pid in self._pids[name]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _receive(self, name: str, timeout_s: float | None) -> Turn | list[int]:
        try:
            if not self._connections[name].poll(timeout_s):
                raise self._failure(name, f"was not up after {timeout_s} s")
            answer = self._connections[name].recv()
        except EOFError:
            raise self._failure(name, "ended") from None
        if isinstance(answer, str):
            raise self._failure(name, answer)
        return answer

    def _failure(self, name: str, what: str) -> WorkerFailed:
        last_lines = self._log(name).read_text(errors="replace").splitlines()[-LOG_LINES:]
        return WorkerFailed("\n".join([f"{name}: {what}", *last_lines]))

    def _log(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-').replace('/', '-')}.log"


@contextmanager
def running(systems: Sequence[System], dtype: str, core: int, folder: Path) -> Iterator[Fleet]:
    """A fleet that is ended whatever happens."""
    fleet = Fleet(systems, dtype, core, folder)
    try:
        with console.status(f"starting {len(systems)} engines"):
            fleet.start()
        yield fleet
    finally:
        fleet.close()


def held_out_prompts(seed: int) -> Iterator[list[int]]:
    """Windows of the files that the bundled pair was not trained on, each of another place."""
    _, texts = read_sources(0)
    yield from prompt_windows(texts, seed)


def prompt_windows(texts: Sequence[str], seed: int) -> Iterator[list[int]]:
    """Prompts cut from `texts`, each of another place, shuffled."""
    tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    places = [(i, start) for i, ids in enumerate(tokens) for start in range(0, len(ids) - PROMPT_TOKENS, PROMPT_TOKENS)]
    random.Random(seed).shuffle(places)
    for i, start in places:
        yield tokens[i][start : start + PROMPT_TOKENS]


def ssd_system(
    name: str, target: str | Path, drafter: str | Path, options: dict[str, object], args: argparse.Namespace
) -> System:
    """SSD with a drafter on the second core; `options` are further keys of its speculative_config."""
    config = {
        "method": "ssd",
        "model": str(drafter),
        "dtype": args.dtype,
        "drafter_cpus": str(args.cores[1]),
        "kv_cache_memory": "192MiB",
        **options,
    }
    return System(name, "ssd", str(target), config)


def make_systems(target: Path, drafter: Path, args: argparse.Namespace) -> list[System]:
    """Plain, stock at every K, every SSD, and one ceiling that serves them all."""

    def system(name: str, method: str, config: dict | None = None) -> System:
        return System(name, method, str(target), config)

    systems = [system("plain", "plain")]
    for k in args.stock_k:
        config = {
            "method": "draft_model",
            "model": str(drafter),
            "num_speculative_tokens": k,
            "draft_sample_method": args.stock_draft_sampling,
        }
        systems.append(system(f"stock K={k}", "stock", config))
    for options in args.ssd:
        k = options["num_speculative_tokens"]
        more = [f"{key}={value}" for key, value in options.items() if key != "num_speculative_tokens"]
        systems.append(ssd_system(" ".join([f"SSD K={k}", *more]), target, drafter, options, args))
    longest = max([*args.stock_k, *(options["num_speculative_tokens"] for options in args.ssd)])
    replay = {"method": "custom_class", "model": "bench_worker.Replay", "num_speculative_tokens": longest}
    return [*systems, system("ceiling", "ceiling", replay)]


def measure_costs(fleet: Fleet, prompts: Iterator[list[int]]) -> dict:
    """Milliseconds of a verification of 1 + K tokens and of one of stock's draft steps, at batch 1."""
    verify: dict[int, list[float]] = {}
    stock: dict[int, list[float]] = {}
    fleet.ask("plain", Request([next(prompts)], 1, COST_TOKENS))
    for _ in range(COST_ROUNDS):
        prompt = next(prompts)
        for system in fleet.systems:
            if system.method == "plain":
                verify.setdefault(0, []).extend(fleet.ask("plain", Request([prompt], 1, COST_TOKENS)).steps_s)
            elif system.method == "stock":
                k = system.speculative_config["num_speculative_tokens"]
                junk = Request([prompt], 1, COST_TOKENS, num_junk_drafts=k)
                verify.setdefault(k, []).extend(fleet.ask("ceiling", junk).steps_s)
                stock.setdefault(k, []).extend(fleet.ask(system.name, Request([prompt], 1, COST_TOKENS)).steps_s)
    return {
        "verify_ms": {k: 1e3 * median(seconds) for k, seconds in verify.items()},
        "draft_step_ms": {k: 1e3 * (median(seconds) - median(verify[k])) / k for k, seconds in stock.items()},
    }


def one_round(fleet: Fleet, request: Request, turn: int) -> Round:
    """Every system in turn, beginning with another one each time; a ceiling follows directly on its SSD."""
    systems = [system for system in fleet.systems if system.method != "ceiling"]
    first = turn % len(systems)
    done = Round()
    for system in systems[first:] + systems[:first]:
        done.turns[system.name] = answer = fleet.ask(system.name, request)
        if system.method == "ssd" and request.temperature == 0:
            replay = Request(request.prompts, request.batch_size, request.max_tokens, replay=answer.drafts)
            done.turns[f"ceiling of {system.name}"] = fleet.ask("ceiling", replay)
        answer.drafts = {}
    return done


def measure_point(
    fleet: Fleet, prompts: Iterator[list[int]], batch_size: int, temperature: float, args: argparse.Namespace
) -> list[Round]:
    """`--rounds` undisturbed rounds after one that warms up, or what twice as many attempts gave."""
    num_prompts = max(batch_size, args.prompts)
    num_prompts -= num_prompts % batch_size
    rounds: list[Round] = []
    with console.status("") as status:
        for turn in range(2 * args.rounds + 1):
            request = Request([next(prompts) for _ in range(num_prompts)], batch_size, args.tokens, temperature)
            done = one_round(fleet, request, turn)
            if turn:
                rounds.append(done)
            undisturbed = sum(not r.disturbed for r in rounds)
            status.update(f"batch {batch_size}, temperature {temperature:g}: round {undisturbed} of {args.rounds}")
            if undisturbed == args.rounds:
                break
    return rounds


def parse_arguments() -> argparse.Namespace:
    """The command line, with `--quick` applied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_decode.json and bench_decode.png")
    parser.add_argument("--quick", action="store_true", help="dear drafter, batch 1, greedy, 3 short rounds")
    parser.add_argument("--drafters", nargs="+", choices=("dear", "cheap"), default=["dear", "cheap"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--stock-k", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="stock's sweep of K")
    parser.add_argument("--stock-draft-sampling", choices=("greedy", "probabilistic"), default="probabilistic")
    parser.add_argument(
        "--ssd",
        nargs="+",
        type=json.loads,
        default=[{"num_speculative_tokens": 3}, {"num_speculative_tokens": 5}],
        help="SSD's sweep: one JSON object of speculative_config keys each",
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="new tokens a request")
    parser.add_argument("--prompts", type=int, default=2, help="least number of prompts a round")
    parser.add_argument("--intermediate-size", type=int, default=40960, help="of the widened target")
    parser.add_argument("--dear-layers", type=int, default=13)
    parser.add_argument("--cheap-layers", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cores", nargs=2, type=int, default=[0, 1], help="of the engines, and of SSD's drafter")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    args = parser.parse_args()
    if max(args.batch_sizes) > MAX_NUM_SEQS:
        parser.error(f"batch sizes go up to {MAX_NUM_SEQS}")
    if args.quick:
        args.drafters, args.batch_sizes, args.temperatures = ["dear"], [1], [0.0]
        args.stock_k, args.ssd, args.rounds, args.tokens = [2, 3], [{"num_speculative_tokens": 3}], 3, 96
    return args


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, which a worker does before anything of ours
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(sys.argv), "costs": {}, "points": []}
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as temporary:
        folder = Path(temporary)
        widen(PAIR / "target", folder / "target", args.intermediate_size, dtype=args.dtype)
        for name in args.drafters:
            num_layers = {"dear": args.dear_layers, "cheap": args.cheap_layers}[name]
            deepen(PAIR / "drafter", folder / name, num_layers, dtype=args.dtype)
            prompts = held_out_prompts(args.seed)
            systems = make_systems(folder / "target", folder / name, args)
            with running(systems, args.dtype, args.cores[0], folder) as fleet:
                result["costs"][name] = measure_costs(fleet, prompts)
                print_costs(console, name, result["costs"][name])
                for temperature in args.temperatures:
                    for batch_size in args.batch_sizes:
                        rounds = measure_point(fleet, prompts, batch_size, temperature, args)
                        point = summarise(name, batch_size, temperature, systems, rounds)
                        result["points"].append(point)
                        print_point(console, point)
                        (args.out / "bench_decode.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out / "bench_decode.png")
    console.print(f"written to {args.out}")


def run_script(main: Callable[[], None], *failures: type[Exception]) -> None:
    """Run a benchmark; an engine that fails, or what else is named, is its last word, without a traceback."""
    try:
        main()
    except (WorkerFailed, *failures) as failure:
        console.print(str(failure), markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
