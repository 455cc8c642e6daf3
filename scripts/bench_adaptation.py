"""Adaptation from a bad start against the best static setting, on two cores, interleaved.

    python scripts/bench_adaptation.py --out results

In every repetition a fresh engine starts with far too many drafts and an unlearned split of branches. After so many
rounds it is measured in turns with plain decoding and SSD at every fixed K, whose engines have been learning all the
while. Then the prompts change (from Python sources to the English of package descriptions), later the batch size, and
each time it gets as many rounds again before it is measured.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

from bench_decode import PAIR, Fleet, console, held_out_prompts, prompt_windows, run_script, running, ssd_system
from bench_report import environment, spread
from bench_worker import Request, System, Turn
from resize_model import deepen, widen
from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class Phase:
    """What the engines are asked from one change to the next."""

    name: str
    prompts: Iterator[list[int]]
    batch_size: int


def english_prompts(seed: int) -> Iterator[list[int]]:
    """Windows of the descriptions of all installed packages, shuffled."""
    texts = {d.name: d.metadata.get_payload() for d in distributions() if isinstance(d.metadata.get_payload(), str)}
    yield from prompt_windows([text for _, text in sorted(texts.items())], seed)


def make_systems(target: Path, drafter: Path, args: argparse.Namespace) -> tuple[System, list[System]]:
    """The adaptive one, and what it is measured against."""

    def ssd(name: str, num_drafts: int, adaptive: bool) -> System:
        options = {"num_speculative_tokens": num_drafts, "adaptive": adaptive}
        return ssd_system(name, target, drafter, options, args)

    static = [System("plain", "plain", str(target)), *(ssd(f"static K={k}", k, False) for k in args.static_k)]
    return ssd(f"adaptive, from K={args.start_k}", args.start_k, True), static


def settle(fleet: Fleet, name: str, phase: Phase, args: argparse.Namespace) -> list[tuple[int, float, int]]:
    """Let one system decode for `--settle` rounds -> tokens, seconds and rounds of its turns."""
    turns: list[Turn] = []
    while sum(len(turn.steps_s) for turn in turns) < args.settle:
        prompts = [next(phase.prompts) for _ in range(phase.batch_size)]
        turns.append(fleet.ask(name, Request(prompts, phase.batch_size, args.settle_tokens)))
    return [(turn.num_tokens, turn.seconds, len(turn.steps_s)) for turn in turns]


def measure(
    fresh: Fleet, fleet: Fleet, phase: Phase, repetition: int, args: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Tokens and seconds of every system over the same prompts, the order changing from turn to turn."""
    order = [(fresh, fresh.systems[0].name), *((fleet, system.name) for system in fleet.systems)]
    sums = {name: (0.0, 0.0) for _, name in order}
    for turn in range(args.turns):
        first = (repetition * args.turns + turn) % len(order)
        prompts = [next(phase.prompts) for _ in range(max(args.prompts, phase.batch_size))]
        for asked, name in order[first:] + order[:first]:
            answer = asked.ask(name, Request(prompts, phase.batch_size, args.tokens))
            tokens, seconds = sums[name]
            sums[name] = tokens + answer.num_tokens, seconds + answer.seconds
    return sums


def summarise(phases: Sequence[Phase], found: Sequence[dict], adaptive: str) -> list[dict]:
    """For each phase all rates, and the adaptive one over the best static one, which is chosen over all repetitions."""
    rows = []
    for phase in phases:
        measured = [repetition[phase.name]["measured"] for repetition in found]
        rates = {name: sum(m[name][0] for m in measured) / sum(m[name][1] for m in measured) for name in measured[0]}
        best = max((name for name in rates if name != adaptive), key=rates.get)
        ratios = [m[adaptive][0] / m[adaptive][1] / (m[best][0] / m[best][1]) for m in measured]
        rows.append(
            {
                "phase": phase.name,
                "batch_size": phase.batch_size,
                "tokens_per_second": rates,
                "best": best,
                "ratio": spread(ratios) if len(ratios) > 1 else {"median": ratios[0]},
                "settling": settling([repetition[phase.name]["settled"] for repetition in found]),
            }
        )
    return rows


def settling(found: Sequence[Sequence[tuple[int, float, int]]]) -> list[tuple[float, float]]:
    """Rounds since the change and tokens per second, turn by turn; medians over the repetitions."""
    return [
        (
            median(sum(rounds for *_, rounds in turns[: i + 1]) for turns in found),
            median(turns[i][0] / turns[i][1] for turns in found),
        )
        for i in range(min(map(len, found)))
    ]


def plot(rows: Sequence[dict], path: Path) -> None:
    """Tokens per second while settling, over those of the best static setting, one panel a phase."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(rows), 2.8), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(rows), sharey=True), rows):
        best = row["tokens_per_second"][row["best"]]
        rounds, rates = zip(*row["settling"])
        axis.plot(rounds, [rate / best for rate in rates], marker="o", color="#d9480f")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=row["phase"], xlabel="rounds since the change", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tok/s over best static")
    figure.savefig(path, dpi=150)


def show(rows: Sequence[dict]) -> None:
    """One line a phase."""
    table = Table(box=SIMPLE_HEAD)
    names = list(rows[0]["tokens_per_second"])
    for heading in ("phase", "batch", *names, "adaptive / best static"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for row in rows:
        rates = row["tokens_per_second"]
        cells = [f"{rates[name]:.1f}{' *' if name == row['best'] else ''}" for name in names]
        ratio = row["ratio"]
        span = f" ({ratio['min']:.3f}-{ratio['max']:.3f})" if "min" in ratio else ""
        table.add_row(row["phase"], str(row["batch_size"]), *cells, f"{ratio['median']:.3f}{span}")
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_adaptation.json and .png")
    parser.add_argument("--start-k", type=int, default=10, help="drafts a round that the adaptive engine starts with")
    parser.add_argument("--static-k", nargs="+", type=int, default=[1, 2, 3, 4, 6])
    parser.add_argument("--settle", type=int, default=500, help="rounds from a change to the measurement")
    parser.add_argument("--settle-tokens", type=int, default=192, help="new tokens a request while settling")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3, help="of measurement, in each phase and repetition")
    parser.add_argument("--prompts", type=int, default=2, help="least number of prompts a turn")
    parser.add_argument("--tokens", type=int, default=192, help="new tokens a request")
    parser.add_argument("--batch-sizes", nargs=2, type=int, default=[1, 4], help="before and after the change")
    parser.add_argument("--intermediate-size", type=int, default=40960, help="of the widened target")
    parser.add_argument("--drafter-layers", type=int, default=13)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cores", nargs=2, type=int, default=[0, 1], help="of the engines, and of the drafters")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    return parser.parse_args()


def main() -> None:
    """Run all repetitions; results are written after each."""
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # before an engine's process loads torch: its threads share one core
    args.out.mkdir(parents=True, exist_ok=True)
    code, english = held_out_prompts(args.seed), english_prompts(args.seed)
    before, after = args.batch_sizes
    phases = [
        Phase("bad start", code, before),
        Phase("other prompts", english, before),
        Phase("other batch size", english, after),
    ]
    found: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="bench-adaptation-") as temporary:
        folder = Path(temporary)
        widen(PAIR / "target", folder / "target", args.intermediate_size, dtype=args.dtype)
        deepen(PAIR / "drafter", folder / "drafter", args.drafter_layers, dtype=args.dtype)
        adaptive, static = make_systems(folder / "target", folder / "drafter", args)
        with running(static, args.dtype, args.cores[0], folder) as fleet:
            for repetition in range(args.repetitions):
                results = {}
                with running([adaptive], args.dtype, args.cores[0], folder) as fresh:
                    for phase in phases:
                        settled = settle(fresh, adaptive.name, phase, args)
                        if not repetition:
                            for system in static:
                                settle(fleet, system.name, phase, args)
                        measured = measure(fresh, fleet, phase, repetition, args)
                        results[phase.name] = {"settled": settled, "measured": measured}
                found.append(results)
                rows = summarise(phases, found, adaptive.name)
                report = {"environment": environment(sys.argv), "phases": rows, "repetitions": found}
                (args.out / "bench_adaptation.json").write_text(json.dumps(report, indent=1) + "\n")
                show(rows)
    plot(rows, args.out / "bench_adaptation.png")


if __name__ == "__main__":
    run_script(main)
