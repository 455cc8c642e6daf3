"""Simulate SSD and its baselines at any scale, from published or measured costs.

    python scripts/simulate.py                                       # 70B/1B on 4 + 1 H100, published inputs
    python scripts/simulate.py --batch-sizes 1 8 64 --drafters 1 2 4
    python scripts/simulate.py --replicas 4 --drafters 1 2 4 --latency-ms 1       # drafters that replicas share
    python scripts/simulate.py --profile profile.json --trace trace.jsonl --systems plain sd push adaptive

`--trace` replays outcomes recorded with VLLM_SSD_TRACE=PATH or `vllm-ssd profile --trace`: one JSON line per outcome,
[drafts, accept length, rank of t* or null, after a hit]. Without it, outcomes are drawn from the profile's acceptance.

Systems: plain, plain decoding; sd, stock speculation; ask, the published SSD, whose target waits for the drafter; push,
this package; uniform, push with one fan-out for all accept lengths; adaptive, push that chooses its K.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ssd.planning import Profile, Recorded, Report, Scenario, Simulation, Synthetic, Workload
from vllm_ssd.planning.profile import Costs
from vllm_ssd.planning.published import (
    PUBLISHED_SD,
    PUBLISHED_SSD,
    SSD_BY_BATCH,
    published_profile,
    published_sd_acceptance,
)

SYSTEMS = ("plain", "sd", "ask", "push", "uniform", "adaptive")


def scenario(system: str, args: argparse.Namespace) -> Scenario:
    """The scenario of one system."""
    if system in ("plain", "sd"):
        return replace(PUBLISHED_SD, method=system, num_drafts=args.stock_drafts)
    if system == "ask":
        return replace(PUBLISHED_SSD, num_drafts=args.ask_drafts)
    push = Scenario(
        num_drafts=args.drafts, branch_budget=args.branches, on_miss=args.on_miss, adaptive=system == "adaptive"
    )
    uniform = max(1, args.branches // (args.drafts + 1))
    return replace(push, fan_out=uniform) if system == "uniform" else push


def play(system: str, drafters: int, batch_size: int, profile: Profile, args: argparse.Namespace) -> Report:
    """Simulate one system at one batch size."""
    acceptance = profile.acceptance_at(args.temperature)
    if system == "sd" and not args.profile:
        acceptance = published_sd_acceptance()
    rounds = [tuple(json.loads(line)) for line in args.trace.read_text().splitlines()] if args.trace else None

    def outcomes(request: int) -> Recorded | Synthetic:
        return Recorded(rounds, request) if rounds else Synthetic(acceptance, request)

    workload = Workload(batch_size, args.requests * batch_size, args.tokens, args.arrivals_per_s)
    settings = replace(scenario(system, args), num_drafters=drafters)
    return Simulation(shared(profile.costs, args), outcomes, settings, workload, args.seed).run()


def shared(costs: Costs, args: argparse.Namespace) -> Costs:
    """The costs as one of `--replicas` sees them that share the drafters: a step carries as many rows of each."""
    steps = tuple((rows / args.replicas, seconds) for rows, seconds in costs.draft_step)
    latency_s = costs.latency_s if args.latency_ms is None else args.latency_ms / 1e3
    sync_step = costs.sync_step or costs.draft_step  # stock speculation drafts on each replica's own devices
    return replace(costs, draft_step=steps, sync_step=sync_step, latency_s=latency_s)


def plot(reports: list[dict], title: str, path: Path) -> None:
    """Plot tok/s relative to plain decoding over batch size; needs the system "plain"."""
    from matplotlib.figure import Figure

    plain = {r["batch_size"]: r["tokens_per_s"] for r in reports if r["system"] == "plain"}
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    lines: dict[tuple[str, int], list[dict]] = {}
    for report in reports:
        lines.setdefault((report["system"], report["drafters"]), []).append(report)
    several = len({drafters for _, drafters in lines}) > 1
    sizes = list(plain)
    for (system, drafters), line in lines.items():
        name = f"{system}, {drafters} drafters" if several and system in SYSTEMS[2:] else system
        axis.plot(sizes, [r["tokens_per_s"] / plain[r["batch_size"]] for r in line], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set(title=title, xlabel="batch size", ylabel="simulated tok/s over plain", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or the arguments given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="JSON of `vllm-ssd profile` (default: published 70B/1B inputs)")
    parser.add_argument("--trace", type=Path, help="recorded outcomes, as JSON lines")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--drafters", nargs="+", type=int, default=[1])
    parser.add_argument("--replicas", type=int, default=1, help="targets of equal load that share the drafters")
    parser.add_argument("--latency-ms", type=float, help="to a drafter and back (default: the profile's)")
    parser.add_argument("--drafts", type=int, default=6, help="K of push, uniform and adaptive")
    parser.add_argument("--branches", type=int, default=28, help="branches per request of push, uniform and adaptive")
    parser.add_argument("--stock-drafts", type=int, default=6)
    parser.add_argument("--ask-drafts", type=int, default=7)
    parser.add_argument("--on-miss", choices=("skip", "wait", "auto"), default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--requests", type=int, default=4, help="requests per batch slot")
    parser.add_argument("--tokens", type=int, default=512, help="new tokens per request")
    parser.add_argument("--arrivals-per-s", type=float, help="requests per second (default: all at once)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    parser.add_argument("--plot", type=Path, help="also plot tok/s relative to plain decoding over batch size")
    return parser.parse_args(arguments)


def main() -> None:
    """Simulate every system at every batch size and print a table."""
    args = parse_arguments()
    profile = Profile.from_json(args.profile.read_bytes()) if args.profile else published_profile()
    table = Table(box=SIMPLE_HEAD, title=f"{profile.target} / {profile.drafter}", title_justify="left")
    for name in ("batch", "system", "drafters", "tok/s", "per device", "hits", "late", "tok/round", "ms/round"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for name in ("verify", "draft", "just in time", "tree", "published"):
        table.add_column(name, justify="right")
    reports = []
    for batch_size in args.batch_sizes:
        for system in args.systems:
            for drafters in args.drafters if system in SYSTEMS[2:] else args.drafters[:1]:
                report = play(system, drafters, batch_size, profile, args)
                speculative = system in SYSTEMS[2:]
                devices = profile.target_devices + speculative * drafters * profile.drafter_devices
                published = SSD_BY_BATCH.get(batch_size) if system == "ask" and not args.profile else None
                parts_s = (report.verify_s, report.draft_s, report.jit_s, report.build_s)
                table.add_row(
                    str(batch_size),
                    system,
                    str(drafters) if speculative else "",
                    f"{report.tokens_per_s:.0f}",
                    f"{report.tokens_per_s / devices:.1f}",
                    f"{report.hit_rate:.0%}" if speculative else "",
                    f"{report.late / report.row_rounds:.0%}" if speculative else "",
                    f"{report.tokens / report.row_rounds:.2f}",
                    f"{1e3 * report.seconds / report.rounds:.2f}",
                    *(f"{1e3 * part / report.rounds:.2f}" if part else "" for part in parts_s),
                    f"{published:.0f}" if published else "",
                )
                settings = {"system": system, "batch_size": batch_size, "drafters": drafters}
                reports.append(settings | asdict(report) | {"tokens_per_s": report.tokens_per_s})
    Console(highlight=False, width=150).print(table)
    if args.plot:
        plot(reports, f"{profile.target} / {profile.drafter}", args.plot)
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1) + "\n")


if __name__ == "__main__":
    main()
