"""Compare the adaptive number of drafts, from a bad start, with the best fixed one, on two cores.

    python scripts/bench_adaptation.py --out results

In every repetition a fresh engine starts with far too many drafts and an unlearned split of branches. After `--settle`
rounds its adaptive rate is measured in turns with fixed numbers of drafts on the same engine; the adaptation does not
learn from the fixed turns, the drafter learns from all. Then the prompts change (from Python sources to the English of
package descriptions), later the batch size, each time with as many rounds before the next measurement. The comparison
is within one engine because equal engines differ by several percent. The best fixed setting is taken from the other
repetitions, otherwise noise would pick it.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import cast

from bench_prompts import held_out_prompts, prompt_windows
from bench_report import environment, spread
from bench_systems import PAIR, Fleet, add_cores, bundled_pair, choose_cores, console, run_script, running
from bench_worker import Request, Turn
from resize_model import deepen, widen
from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class Phase:
    """Prompts and batch size between two changes."""

    name: str
    prompts: Iterator[list[int]]
    batch_size: int


@dataclass
class Measured:
    """All turns of one setting, and the rounds of each number of drafts in them."""

    tokens: int = 0
    seconds: float = 0.0
    rounds: Counter[int] = field(default_factory=Counter)

    def add(self, turn: Turn) -> None:
        """Count one more turn."""
        self.tokens += turn.num_tokens
        self.seconds += turn.seconds
        self.rounds += turn.wanted

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def english_prompts(seed: int) -> Iterator[list[int]]:
    """Windows of the descriptions of all installed packages, shuffled."""
    bodies = ((d.name, cast(Message, d.metadata).get_payload()) for d in distributions())
    texts = {name: body for name, body in bodies if isinstance(body, str)}
    yield from prompt_windows([text for _, text in sorted(texts.items())], seed)


def settle(engine: Fleet, phase: Phase, args: argparse.Namespace) -> list[tuple[int, float, int]]:
    """Let the engine adapt for `--settle` rounds -> tokens, seconds and rounds of its turns."""
    turns: list[Turn] = []
    while sum(len(turn.steps_s) for turn in turns) < args.settle:
        prompts = [next(phase.prompts) for _ in range(phase.batch_size)]
        turns.append(engine.ask(engine.systems[0].name, Request(prompts, phase.batch_size, args.settle_tokens)))
    return [(turn.num_tokens, turn.seconds, len(turn.steps_s)) for turn in turns]


def measure(engine: Fleet, phase: Phase, args: argparse.Namespace) -> dict[str, Measured]:
    """Measure every setting on the same prompts, in rotating order; "no drafts" in the first turn only."""
    settings = [("adaptive", None), *((f"K={k}", k) for k in args.fixed_k)]
    found = {name: Measured() for name in ["no drafts", *dict(settings)]}
    for turn in range(args.turns):
        first = turn % len(settings)
        order = settings[first:] + settings[:first]
        prompts = [next(phase.prompts) for _ in range(max(args.prompts, phase.batch_size))]
        for name, held in order if turn else [*order, ("no drafts", 0)]:
            request = Request(prompts, phase.batch_size, args.tokens, num_held_drafts=held)
            found[name].add(engine.ask(engine.systems[0].name, request))
    return found


def summarise(phases: Sequence[Phase], found: Sequence[dict]) -> list[dict]:
    """For each phase the rates, and the adaptive rate over the best fixed one, chosen from the other repetitions."""
    rows = []
    for phase in phases:
        measured = [repetition[phase.name]["measured"] for repetition in found]
        ratios, bests = [], []
        for i, here in enumerate(measured):
            bests.append(best_fixed(total_rates(measured[:i] + measured[i + 1 :] or measured)))
            ratios.append(here["adaptive"].rate / here[bests[i]].rate)
        rates = total_rates(measured)
        rows.append(
            {
                "phase": phase.name,
                "batch_size": phase.batch_size,
                "tokens_per_second": rates,
                "best": best_fixed(rates),
                "best_of_others": bests,
                "ratios": ratios,
                "ratio": spread(ratios) if len(ratios) > 1 else {"median": ratios[0]},
                "settling": settling([repetition[phase.name]["settled"] for repetition in found]),
            }
        )
    return rows


def total_rates(measured: Sequence[dict[str, Measured]]) -> dict[str, float]:
    """Tokens per second of every setting over several repetitions."""
    return {
        name: sum(m[name].tokens for m in measured) / sum(m[name].seconds for m in measured) for name in measured[0]
    }


def best_fixed(rates: dict[str, float]) -> str:
    """The setting with the most tokens per second, the adaptive one apart."""
    return max((name for name in rates if name != "adaptive"), key=lambda name: rates[name])


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
    """Tokens per second while settling, over those of the best fixed setting, one panel a phase."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(rows), 2.8), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(rows), sharey=True), rows):
        best = row["tokens_per_second"][row["best"]]
        rounds, rates = zip(*row["settling"])
        axis.plot(rounds, [rate / best for rate in rates], marker="o", color="#d9480f")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=row["phase"], xlabel="rounds since the change", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tok/s over best fixed")
    figure.savefig(path, dpi=150)


def show(rows: Sequence[dict]) -> None:
    """One line a phase."""
    table = Table(box=SIMPLE_HEAD)
    names = list(rows[0]["tokens_per_second"])
    for heading in ("phase", "batch", *names, "adaptive / best fixed"):
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
    parser.add_argument("--fixed-k", nargs="+", type=int, default=[2, 4, 6, 8], help="settings to compare with")
    parser.add_argument("--settle", type=int, default=500, help="rounds from a change to the measurement")
    parser.add_argument("--settle-tokens", type=int, default=192, help="new tokens a request while settling")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--turns", type=int, default=8, help="of measurement, in each phase and repetition")
    parser.add_argument("--prompts", type=int, default=2, help="least number of prompts a turn")
    parser.add_argument("--tokens", type=int, default=192, help="new tokens a request")
    parser.add_argument("--batch-sizes", nargs=2, type=int, default=[1, 4], help="before and after the change")
    parser.add_argument("--intermediate-size", type=int, default=40960, help="of the widened target")
    parser.add_argument("--drafter-layers", type=int, default=13)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add_cores(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    return parser.parse_args()


def main() -> None:
    """Run all repetitions; results are written after each."""
    args = parse_arguments()
    cores = choose_cores(args.cores, is_cpu=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
        options = {"num_speculative_tokens": args.start_k}
        pair = bundled_pair("drafter", folder / "target", folder / "drafter", args.dtype, cores)
        system = pair.speculative(options, name=f"adaptive, from K={args.start_k}")
        for _ in range(args.repetitions):
            with running([system], cores[0], folder) as engine:
                found.append(
                    {
                        phase.name: {"settled": settle(engine, phase, args), "measured": measure(engine, phase, args)}
                        for phase in phases
                    }
                )
            rows = summarise(phases, found)
            report = {"environment": environment(sys.argv), "phases": rows, "repetitions": found}
            (args.out / "bench_adaptation.json").write_text(json.dumps(report, indent=1, default=vars) + "\n")
            show(rows)
    plot(rows, args.out / "bench_adaptation.png")


if __name__ == "__main__":
    run_script(main)
