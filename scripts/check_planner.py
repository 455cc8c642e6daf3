"""Compare the planner's predictions with measured tokens per second, on two cores.

    python scripts/check_planner.py --out results --drafter-layers 2 8

In every turn each engine of the profile runs once, then every setting of SSD, plain decoding and stock speculation, at
each batch size, so that a slow phase of the machine affects predictions and measurements alike. The profile contains
none of the measured settings. Its acceptance comes from an engine of its own with the same prompts, because acceptance
varies more between texts than predictions may be wrong.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from bench_prompts import held_out_prompts
from bench_report import environment
from bench_systems import PAIR, Fleet, Pair, add_cores, bundled_pair, choose_cores, console, run_script, running
from bench_worker import Request, System, Turn
from resize_model import deepen, widen
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_ssd.planning import Prediction, Profile, Setting, Shape, predict_plain, predict_sd, predict_ssd
from vllm_ssd.planning.measure import Profiler, Subject


def make_systems(pair: Pair, args: argparse.Namespace) -> list[System]:
    """Plain, stock at one K, and SSD at every setting."""
    systems = [pair.plain(), pair.stock(args.stock_k, parallel_drafting=drafts_in_parallel(pair.drafter))]
    for num_drafts, budget in args.points:
        options = {
            "num_speculative_tokens": num_drafts,
            "branch_budget": budget,
            "on_miss": args.on_miss,
            "adaptive": False,
        }
        systems.append(pair.speculative(options, name=f"SSD K={num_drafts} N={budget}"))
    return systems


def drafts_in_parallel(folder: str) -> bool:
    """Whether the draft model has a mask token."""
    return Shape.from_config(json.loads((Path(folder) / "config.json").read_text())).parallel


def predict(profile: Profile, system: System, rows: float) -> Prediction:
    """The prediction for one system, interpolated between whole batch sizes because requests end one by one."""
    low = predict_at(profile, system, int(rows))
    if rows == int(rows):
        return low
    high, share = predict_at(profile, system, int(rows) + 1), rows - int(rows)
    names = ("tokens_per_s", "round_s", "tokens_per_round", "hit_rate")
    return replace(low, **{n: (1 - share) * getattr(low, n) + share * getattr(high, n) for n in names})


def predict_at(profile: Profile, system: System, batch_size: int) -> Prediction:
    """The same for one batch size."""
    acceptance, config = profile.acceptance_at(0.0), system.speculative_config
    if config is None:
        return predict_plain(profile, batch_size)
    if system.method == "stock":
        return predict_sd(profile, acceptance, batch_size, system.num_drafts)
    setting = Setting(batch_size, system.num_drafts, config["branch_budget"], config["on_miss"])
    return predict_ssd(profile, acceptance, setting)


def measure(
    fleet: Fleet, systems: list[System], profiler: Profiler, prompts: list[list[int]], args: argparse.Namespace
) -> Iterator[dict[tuple[str, int], list[Turn]]]:
    """After each turn but the first, which warms up, all turns so far by system and batch size."""
    found: dict[tuple[str, int], list[Turn]] = {}
    with console.status("") as status:
        for turn in range(args.turns + 1):
            if turn:
                profiler.sample(lambda name, turn=turn: status.update(f"turn {turn}: {name}"))
            chosen = prompts[turn * args.prompts : (turn + 1) * args.prompts]
            for batch_size in args.batch_sizes:
                for system in systems[turn % len(systems) :] + systems[: turn % len(systems)]:
                    status.update(f"turn {turn}: {system.name}, batch {batch_size}")
                    answer = fleet.ask(system.name, Request(chosen, batch_size, args.tokens))
                    answer.drafts = {}
                    if turn:
                        found.setdefault((system.name, batch_size), []).append(answer)
            if turn:
                yield found


def compare(
    layers: int, profile: Profile, systems: Sequence[System], found: dict, args: argparse.Namespace
) -> list[dict]:
    """One row a system and batch size."""
    rows = []
    for batch_size in args.batch_sizes:
        for system in systems:
            turns = found[system.name, batch_size]
            tokens, seconds = sum(t.num_tokens for t in turns), sum(t.seconds for t in turns)
            row_rounds, rounds = sum(t.row_rounds for t in turns), sum(len(t.steps_s) for t in turns)
            counts = {key: sum(turn.counts.get(key, 0) for turn in turns) for key in ("hits", "misses", "late")}
            predicted = predict(profile, system, row_rounds / rounds)
            measured = tokens / seconds
            rows.append(
                {
                    "drafter_layers": layers,
                    "system": system.name,
                    "method": system.method,
                    "batch_size": batch_size,
                    "measured": measured,
                    "error": predicted.tokens_per_s / measured - 1,
                    "mean_batch_size": row_rounds / rounds,
                    "rates": [turn.num_tokens / turn.seconds for turn in turns],
                    "tokens_per_round": tokens / row_rounds,
                    "round_ms": 1e3 * seconds / rounds,
                    "delayed_share": sum(t.delayed_s for t in turns) / seconds,
                    "hit_rate": counts["hits"] / max(sum(counts.values()), 1),
                    "predicted": asdict(predicted),
                }
            )
    return rows


def verdict(rows: Sequence[dict]) -> dict:
    """Median error over the points of SSD, and the recommended system's rate over the best measured one's."""
    ssd = [row for row in rows if row["method"] == "ssd"]
    recommended = []
    for case in dict.fromkeys((row["drafter_layers"], row["batch_size"]) for row in rows):
        same = [row for row in rows if (row["drafter_layers"], row["batch_size"]) == case]
        chosen = max(same, key=lambda row: row["predicted"]["tokens_per_s"])
        best = max(same, key=lambda row: row["measured"])
        of_best = median(a / b for a, b in zip(chosen["rates"], best["rates"]))
        names = {"chosen": chosen["system"], "best": best["system"], "of_best": of_best}
        recommended.append({"drafter_layers": case[0], "batch_size": case[1], **names})
    return {
        "points": len(ssd),
        "median_error": median(abs(row["error"]) for row in ssd),
        "worst_error": max(abs(row["error"]) for row in ssd),
        "bias": median(row["error"] for row in ssd),
        "recommended": recommended,
    }


def show(rows: Sequence[dict], result: dict) -> None:
    """Print the table, and the verdict below it."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("layers", "batch", "system", "predicted", "measured", "error", "tok/round", "ms/round", "hits"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for row in rows:
        p = row["predicted"]
        table.add_row(
            str(row["drafter_layers"]),
            str(row["batch_size"]),
            row["system"],
            f"{p['tokens_per_s']:.1f}",
            f"{row['measured']:.1f}",
            f"{row['error']:+.1%}",
            f"{p['tokens_per_round']:.2f} / {row['tokens_per_round']:.2f}",
            f"{1e3 * p['round_s']:.2f} / {row['round_ms']:.2f}",
            f"{p['hit_rate']:.0%} / {row['hit_rate']:.0%}" if row["method"] == "ssd" else "",
        )
    console.print(table)
    console.print_json(data=result)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Predicted against measured tokens per second; between the dotted lines the error is at most 10 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for method, colour in (("plain", "black"), ("stock", "#8c8c8c"), ("ssd", "#d9480f")):
        points = [row for row in rows if row["method"] == method]
        predicted = [row["predicted"]["tokens_per_s"] for row in points]
        axis.scatter([row["measured"] for row in points], predicted, color=colour, label=method, s=18)
    ends = [0.9 * min(row["measured"] for row in rows), 1.1 * max(row["measured"] for row in rows)]
    for factor, style in ((1, "-"), (1.1, ":"), (0.9, ":")):
        axis.plot(ends, [factor * end for end in ends], style, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="measured tok/s", ylabel="predicted tok/s")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the profile and check_planner.json")
    parser.add_argument(
        "--drafter",
        type=Path,
        default=PAIR / "drafter",
        help="folder of another draft model of the bundled shape, as train_pair.py --parallel writes one",
    )
    parser.add_argument("--drafter-layers", nargs="+", type=int, default=[2, 8], help="one deepened drafter each")
    parser.add_argument("--intermediate-size", type=int, default=24576, help="of the widened target")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument(
        "--points",
        nargs="+",
        type=lambda text: tuple(map(int, text.split(":"))),
        default=[(2, 6), (3, 16), (5, 24)],
        help="settings of SSD, as K:BRANCHES",
    )
    parser.add_argument("--on-miss", choices=("skip", "wait", "auto"), default="skip")
    parser.add_argument("--stock-k", type=int, default=3)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=4, help="a turn; a multiple of all batch sizes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add_cores(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def check(layers: int, target: Path, folder: Path, args: argparse.Namespace) -> Iterator[tuple[list[dict], Profile]]:
    """Measured and predicted points with a drafter of so many layers, and the profile, after every turn."""
    folder.mkdir()
    deepen(args.drafter, folder / "drafter", layers, dtype=args.dtype)
    cores = choose_cores(args.cores, is_cpu=True)
    pair = bundled_pair("drafter", target, folder / "drafter", args.dtype, cores)
    source = held_out_prompts(args.seed)
    prompts = [next(source) for _ in range((args.turns + 1) * args.prompts)]
    systems = make_systems(pair, args)
    subject = Subject(
        pair.target,
        pair.drafter,
        prompts[args.prompts :],
        {name: value for name, value in pair.engine_args.items() if name != "max_num_seqs"},
        pair.ssd,
        args.batch_sizes,
        max(num_drafts for num_drafts, _ in args.points),
        tokens=args.tokens,
        prompts_a_turn=args.prompts,
        target_cpus=cores[0],
    )
    with running(systems, cores[0], folder) as fleet, Profiler(subject, folder, True) as profiler:
        for found in measure(fleet, systems, profiler, prompts, args):
            profile = profiler.profile()
            yield compare(layers, profile, systems, found, args), profile


def main() -> None:
    """Measure, predict, compare."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="check-planner-") as temporary:
        target = Path(temporary) / "target"
        widen(PAIR / "target", target, args.intermediate_size, dtype=args.dtype)
        for layers in args.drafter_layers:
            before = rows
            for points, profile in check(layers, target, Path(temporary) / str(layers), args):
                rows = before + points
                result = verdict(rows)
                report = {"environment": environment(sys.argv), "verdict": result, "points": rows}
                (args.out / f"profile-{layers}.json").write_text(profile.to_json())
                (args.out / "check_planner.json").write_text(json.dumps(report, indent=1) + "\n")
    show(rows, result)
    plot(rows, args.out / "check_planner.png")


if __name__ == "__main__":
    run_script(main)
