"""Decode throughput of plain vLLM, stock `draft_model`, SSD and SSD's ceiling, interleaved.

    python scripts/bench_decode.py --out results            # the bundled pair, everything, about an hour and a half
    python scripts/bench_decode.py --out results --quick    # one point with a dear drafter, a few minutes
    python scripts/bench_decode.py --out results --target Qwen/Qwen3-8B --drafter Qwen/Qwen3-0.6B --prompts mine.jsonl

Every system is an engine in a process of its own, on a CPU all on the same cores, SSD's drafter on others. They are
started together and asked in turn, so that whatever changes on the machine hits them alike; ratios are taken within a
round of turns. Idle ones are suspended: the network threads of an idle vLLM engine take 2 % of a core. The ceiling is
SSD's own drafts of that round, replayed at no cost; where text is sampled it is not defined. On a GPU (or with --apart)
one engine is up at a time, as each takes most of the memory, and there is no ceiling.

Of the bundled pair, a target of any cost comes from widening, a drafter of any cost from deepening. *Dear* means that
stock speculation at its best K spends nearly as long drafting as verifying, and that K + 1 of the drafter's steps just
fit into one verification; *cheap* is one fifth of that. What the sizes below give on this machine is measured first
and printed. Models of your own are measured as they are, on your prompts: JSON lines with `prompt` or
`prompt_token_ids`. `--engine` and `--ssd` hold what they need beside vLLM's defaults.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import paced_models
from bench_prompts import encode_prompts, held_out_prompts, read_prompts, repeated
from bench_report import Round, environment, plot, print_costs, print_point, summarise
from bench_systems import (
    MAX_NUM_SEQS,
    PAIR,
    Fleet,
    Pair,
    UserError,
    add_cores,
    bundled_pair,
    choose_cores,
    console,
    drafter_cores,
    on_cpu,
    run_script,
    running,
)
from bench_worker import Request, System
from pair_model import write_weakened
from resize_model import deepen, widen

COST_ROUNDS = 3
COST_TOKENS = 64
SPARE_TOKENS = 64
"""Room for drafts behind the longest text, so that no row comes near max_model_len."""
CPU_KV_CACHE_BYTES = 1 << 30
"""KV memory of each engine on a CPU for models of the user's; all engines are up together."""
BUNDLED_DEFAULTS = {
    "drafters": ["dear", "cheap"],
    "intermediate_size": 40960,
    "dear_layers": 13,
    "cheap_layers": 2,
    "drafter_noise": 0.0,
    "pace": None,
}


def make_systems(pair: Pair, args: argparse.Namespace, *, ceiling: bool) -> list[System]:
    """Plain, stock at every K, every SSD, and one ceiling that serves them all."""
    systems = [pair.plain()]
    systems += [pair.stock(k, draft_sample_method=args.stock_draft_sampling) for k in args.stock_k]
    for options in args.ssd:
        systems.append(pair.speculative(options))
        if args.ssd_only_hidden:
            systems.append(pair.speculative({**options, "on_miss": "skip"}))
    if ceiling:
        systems.append(pair.ceiling(max([*args.stock_k, *(o["num_speculative_tokens"] for o in args.ssd)])))
    return list({system.name: system for system in systems}.values())


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
                k = system.num_drafts
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
    rounds: list[Round] = []
    with console.status("") as status:
        for turn in range(2 * args.rounds + 1):
            done = one_round(fleet, make_request(prompts, batch_size, temperature, args), turn)
            if turn:
                rounds.append(done)
            undisturbed = sum(not r.disturbed for r in rounds)
            status.update(f"batch {batch_size}, temperature {temperature:g}: round {undisturbed} of {args.rounds}")
            if undisturbed == args.rounds:
                break
    return rounds


def make_request(
    prompts: Iterator[list[int]], batch_size: int, temperature: float, args: argparse.Namespace
) -> Request:
    """One turn's request: whole batches, at least `--prompts-a-round` prompts unless a batch is larger."""
    num_prompts = max(batch_size, args.prompts_a_round)
    num_prompts -= num_prompts % batch_size
    return Request([next(prompts) for _ in range(num_prompts)], batch_size, args.tokens, temperature)


def points(args: argparse.Namespace) -> list[tuple[float, int]]:
    """Temperatures and batch sizes, in the order in which they are measured."""
    return [(temperature, batch_size) for temperature in args.temperatures for batch_size in args.batch_sizes]


def measure_together(
    pair: Pair, prompts: Iterator[list[int]], cores: list[tuple[int, ...]], folder: Path, args: argparse.Namespace
) -> Iterator[tuple[str, dict]]:
    """("costs", of the pair), then ("point", one) for each point: all engines up, and asked in turn."""
    systems = make_systems(pair, args, ceiling=True)
    with running(systems, cores[0], folder) as fleet:
        yield "costs", measure_costs(fleet, prompts)
        for temperature, batch_size in points(args):
            rounds = measure_point(fleet, prompts, batch_size, temperature, args)
            yield "point", summarise(pair.name, batch_size, temperature, systems, rounds)


def measure_apart(
    pair: Pair, prompts: Iterator[list[int]], cores: list[tuple[int, ...]], folder: Path, args: argparse.Namespace
) -> Iterator[tuple[str, dict]]:
    """("point", one) for each point at the end: one engine after the other answers the same requests."""
    systems = make_systems(pair, args, ceiling=False)
    requests = {
        (temperature, batch_size): [
            make_request(prompts, batch_size, temperature, args) for _ in range(args.rounds + 1)
        ]
        for temperature, batch_size in points(args)
    }
    rounds = {point: [Round() for _ in range(args.rounds)] for point in requests}
    for system in systems:
        with running([system], cores[0], folder) as fleet, console.status(system.name):
            for point, of_point in requests.items():
                for turn, request in enumerate(of_point):
                    answer = fleet.ask(system.name, request)
                    answer.drafts = {}
                    if turn:
                        rounds[point][turn - 1].turns[system.name] = answer
    for (temperature, batch_size), of_point in rounds.items():
        yield "point", summarise(pair.name, batch_size, temperature, systems, of_point)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_decode.json and bench_decode.png")
    parser.add_argument("--quick", action="store_true", help="dear drafter, batch 1, greedy, 3 short rounds")
    own = parser.add_argument_group("models of your own")
    own.add_argument("--target", help="name or folder of the served model")
    own.add_argument("--drafter", help="name or folder of the draft model")
    own.add_argument("--prompts", type=Path, help="JSON lines with prompt or prompt_token_ids")
    own.add_argument(
        "--engine", type=json_object, default={}, help="JSON of vLLM engine arguments of every engine, as dtype"
    )
    bundled = parser.add_argument_group("the bundled pair")
    bundled.add_argument("--drafters", nargs="+", choices=("dear", "cheap"), help="default: both")
    bundled.add_argument("--intermediate-size", type=int, help="of the widened target, default 40960")
    bundled.add_argument("--dear-layers", type=int, help="default 13")
    bundled.add_argument("--cheap-layers", type=int, help="default 2")
    bundled.add_argument(
        "--drafter-noise",
        type=float,
        help="of its standard deviation is added to each weight matrix of the drafter, which weakens it; default 0",
    )
    bundled.add_argument(
        "--pace",
        nargs=2,
        type=float,
        metavar=("TARGET_MS", "DRAFTER_MS"),
        help="forwards take so long whatever they compute, see paced_models.py; default: as long as they do here",
    )
    bundled.add_argument("--dtype", choices=("bfloat16", "float32"), help="default bfloat16")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8])
    parser.add_argument("--stock-k", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="stock's sweep of K")
    parser.add_argument("--stock-draft-sampling", choices=("greedy", "probabilistic"), default="probabilistic")
    parser.add_argument(
        "--ssd",
        nargs="+",
        type=ssd_options,
        default=[{"num_speculative_tokens": 3}, {"num_speculative_tokens": 5}],
        help="SSD's sweep: one JSON object of speculative_config keys each",
    )
    parser.add_argument(
        "--ssd-only-hidden",
        action="store_true",
        help="add a row for each SSD without n-gram or just-in-time drafts (on_miss: skip): what hidden drafting gives",
    )
    parser.add_argument("--apart", action="store_true", help="one engine at a time; always so on a GPU")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192, help="new tokens a request")
    parser.add_argument("--prompts-a-round", type=int, default=2, help="least number of prompts a round")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    add_cores(parser)
    return parser


def json_object(text: str) -> dict:
    """A JSON object of the command line."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


def ssd_options(text: str) -> dict:
    """One system of `--ssd`."""
    options = json_object(text)
    if type(options.get("num_speculative_tokens")) is not int:
        raise argparse.ArgumentTypeError(f"{text!r} needs num_speculative_tokens")
    return options


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with `--quick` applied; ends the program with one sentence where it makes no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    own = [args.target, args.drafter, args.prompts]
    given = [name for name in (*BUNDLED_DEFAULTS, "dtype") if getattr(args, name) is not None]
    if any(own) and not all(own):
        parser.error("--target, --drafter and --prompts go together")
    if args.target and given:
        parser.error(f"--{given[0].replace('_', '-')} is for the bundled pair; use --engine for models of your own")
    if args.engine and not args.target:
        parser.error("--engine is for models of your own, given with --target")
    for option in ("target", "drafter"):
        check_model(parser, option, getattr(args, option))
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: there is no spread of one")
    if args.quick:
        args.batch_sizes, args.temperatures = [1], [0.0]
        args.stock_k, args.ssd, args.rounds, args.tokens = [2, 3], [{"num_speculative_tokens": 3}], 3, 96
    if not args.target:
        if args.quick:
            args.drafters = ["dear"]
        for name, value in BUNDLED_DEFAULTS.items():
            setattr(args, name, getattr(args, name) or value)
        args.dtype = args.dtype or "bfloat16"
        if max(args.batch_sizes) > MAX_NUM_SEQS:
            parser.error(f"batch sizes go up to {MAX_NUM_SEQS}")
    return args


def check_model(parser: argparse.ArgumentParser, option: str, model: str | None) -> None:
    """Refuse a folder that is none or holds no model; any other name is for vLLM to find."""
    if model is None:
        return
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").exists():
        parser.error(f"--{option}: {model} holds no config.json")
    if not folder.exists() and (folder.is_absolute() or model.startswith(".")):
        parser.error(f"--{option}: there is no {model}")


def own_pair(
    args: argparse.Namespace, cores: list[tuple[int, ...]], is_cpu: bool
) -> Iterator[tuple[Pair, Iterator[list[int]]]]:
    """The user's models, and prompts for them."""
    prompts = encode_prompts(read_prompts(args.prompts), args.target, args.engine)
    largest = max(args.batch_sizes)
    engine_args = {
        "max_num_seqs": largest,
        "max_model_len": max(map(len, prompts)) + args.tokens + SPARE_TOKENS,
        **({"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES} if is_cpu else {}),
        **args.engine,
    }
    room = engine_args["max_model_len"] - args.tokens
    too_long = next((i for i, prompt in enumerate(prompts, 1) if len(prompt) > room), None)
    if too_long:
        raise UserError(
            f"--prompts: prompt {too_long} has {len(prompts[too_long - 1])} tokens, but max_model_len="
            f"{engine_args['max_model_len']} leaves {room} beside --tokens {args.tokens}"
        )
    wanted = (2 * args.rounds + 1) * max(largest, args.prompts_a_round)
    name = f"{Path(args.target).name} / {Path(args.drafter).name}"
    yield (
        Pair(name, args.target, args.drafter, engine_args, drafter_cores(cores)),
        repeated(prompts, args.seed, wanted),
    )


def bundled_pairs(
    args: argparse.Namespace, cores: list[tuple[int, ...]], folder: Path
) -> Iterator[tuple[Pair, Iterator[list[int]]]]:
    """The bundled models in the sizes asked for, and prompts for them."""
    widen(PAIR / "target", folder / "target", args.intermediate_size, dtype=args.dtype)
    drafter = PAIR / "drafter"
    if args.drafter_noise:
        write_weakened(drafter, folder / "weakened", args.drafter_noise)
        drafter = folder / "weakened"
    for name in args.drafters:
        num_layers = {"dear": args.dear_layers, "cheap": args.cheap_layers}[name]
        deepen(drafter, folder / name, num_layers, dtype=args.dtype)
        pair = bundled_pair(name, folder / "target", folder / name, args.dtype, cores)
        if args.pace:
            pair = paced(pair, args.pace, folder / f"plugin-{name}")
        yield pair, held_out_prompts(args.seed)


def paced(pair: Pair, milliseconds: Sequence[float], folder: Path) -> Pair:
    """`pair` with forwards of its target and of its drafter that take at least `milliseconds`."""
    environment = paced_models.pace_pair(Path(pair.target), Path(pair.drafter), milliseconds, folder)
    return replace(pair, plugin=paced_models.PLUGIN, environment=environment)


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    is_cpu = on_cpu()
    cores = choose_cores(args.cores, is_cpu)
    measure = measure_together if is_cpu and not args.apart else measure_apart
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(sys.argv), "costs": {}, "points": []}
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as temporary:
        folder = Path(temporary)
        if not args.target:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        pairs = own_pair(args, cores, is_cpu) if args.target else bundled_pairs(args, cores, folder)
        for pair, prompts in pairs:
            for kind, found in measure(pair, prompts, cores, folder, args):
                if kind == "costs":
                    result["costs"][pair.name] = found
                    print_costs(console, pair.name, found)
                else:
                    result["points"].append(found)
                    print_point(console, found)
                (args.out / "bench_decode.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out / "bench_decode.png")
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
