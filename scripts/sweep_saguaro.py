"""Measure Saguaro's factor C and the learned split of branches at temperature > 0, with the bundled pair.

    python scripts/sweep_saguaro.py --plot docs/saguaro.png

The target samples continuations of prompts. At each position the two models' distributions give the exact acceptance
rate of a draft from q' and the exact chance that the bonus token is among the first candidates. Tokens per second are
simulated from their means, with the costs of a profile (default: 70B/1B on H100).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from bench_prompts import held_out_prompts
from bench_systems import PAIR
from pair_model import continue_text, load_pair
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ssd.planning import Acceptance, Costs, Profile, Report, Scenario, Simulation, Synthetic, Workload
from vllm_ssd.planning.published import published_profile
from vllm_ssd.policy import MAX_LEARNED_FAN_OUT, saguaro

TOP_M = 64


def distributions(num_prompts: int, length: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """p and q [n, V] along text that the target sampled; columns sorted by q, q cut to its 64 likeliest tokens."""
    target, drafter = load_pair(PAIR)
    source = held_out_prompts(0)
    prompts = torch.tensor([next(source) for _ in range(num_prompts)])
    temperatures = torch.full((num_prompts,), temperature)
    rows = continue_text(target, prompts, prompts.shape[1] + length, temperatures)[:, :-1]
    with torch.no_grad():
        p, q = (
            (model(rows)[:, prompts.shape[1] - 1 :] / temperature).softmax(-1).flatten(0, 1)
            for model in (target, drafter)
        )
    q, order = q.sort(dim=-1, descending=True)
    q[:, TOP_M:] = 0
    return p.gather(1, order).double().numpy(), (q / q.sum(-1, keepdim=True)).double().numpy()


def acceptance_under(p: np.ndarray, q: np.ndarray, fan_out: int, factor: float, temperature: float) -> Acceptance:
    """Expected acceptance and coverage for drafts from q'."""
    proposal = saguaro(q, fan_out, factor)
    rejected = np.maximum(proposal - p, 0)  # chance that a token is proposed and rejected
    chance = rejected.sum(1)
    residual = np.maximum(p - proposal, 0)
    residual /= np.maximum(residual.sum(1, keepdims=True), 1e-12)
    accept = float(1 - chance.mean())
    covered = []
    for count in range(1, MAX_LEARNED_FAN_OUT + 1):
        # The candidates are the `count` likeliest tokens other than the rejected one.
        inside = rejected[:, :count].sum(1)
        first, one_more = residual[:, :count].sum(1), residual[:, : count + 1].sum(1)
        covered.append(float(((chance - inside) * first + inside * one_more).sum() / chance.sum()))
    accepted = p[:, :MAX_LEARNED_FAN_OUT].sum(0).cumsum() / len(p)
    curve = tuple(float(min(c, 1.0)) for c in accepted)
    covered = tuple(float(min(c, 1.0)) for c in np.maximum.accumulate(covered))
    return Acceptance((accept,), (accept,), covered, curve, curve, temperature, factor, rounds=len(p))


def play(costs: Costs, acceptance: Acceptance, fan_out: int | None, args: argparse.Namespace) -> Report:
    """Simulate with a uniform fan-out, or (None) with a learned split of the same budget."""
    scenario = Scenario(
        num_drafts=args.drafts, branch_budget=args.fan_out * (args.drafts + 1), fan_out=fan_out, on_miss="skip"
    )
    workload = Workload(args.batch_size, 24, 1024)
    return Simulation(costs, lambda i: Synthetic(acceptance, i), scenario, workload).run()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="profile with the costs to use (default: 70B/1B)")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.7, 1.0])
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0])
    parser.add_argument("--fan-out", type=int, default=3, help="F of the uniform split and of Saguaro sampling")
    parser.add_argument("--drafts", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    """Run the sweep, print a table, and plot it."""
    args = parse_arguments()
    profile = Profile.from_json(args.profile.read_bytes()) if args.profile else published_profile()
    table = Table(box=SIMPLE_HEAD)
    for name in ("T", "C", "acceptance", "hits, uniform", "hits, learned", "tok/s, uniform", "tok/s, learned"):
        table.add_column(name, justify="right")
    lines: dict[float, list[tuple[float, float, float, float]]] = {}
    for temperature in args.temperatures:
        p, q = distributions(args.prompts, args.tokens, temperature)
        for factor in args.factors:
            acceptance = acceptance_under(p, q, args.fan_out, factor, temperature)
            uniform, learned = (play(profile.costs, acceptance, f, args) for f in (args.fan_out, None))
            table.add_row(
                *(f"{temperature:g}", f"{factor:g}", f"{acceptance.after_hit[0]:.3f}"),
                *(f"{report.hit_rate:.1%}" for report in (uniform, learned)),
                *(f"{report.tokens_per_s:.1f}" for report in (uniform, learned)),
            )
            line = factor, acceptance.after_hit[0], learned.hit_rate, learned.tokens_per_s
            lines.setdefault(temperature, []).append(line)
    Console(highlight=False, width=120).print(table)
    if args.plot:
        plot(lines, args.plot)


def plot(lines: dict[float, list[tuple[float, float, float, float]]], path: Path) -> None:
    """Plot acceptance, hit rate, and tokens per second relative to C = 1, over C."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(lines), 3.4), layout="constrained")
    for axis, (temperature, line) in zip(figure.subplots(1, len(lines), squeeze=False, sharey=True)[0], lines.items()):
        factors, accept, hits, rates = map(np.array, zip(*line))
        for name, values in (("acceptance", accept), ("hit rate", hits)):
            axis.plot(factors, values, marker="o", label=name)
        axis.plot(factors, rates / rates[factors.argmax()], marker="o", color="#d9480f", label="tok/s over C = 1")
        axis.set(title=f"temperature {temperature:g}", xlabel="C", ylim=(0, 1.15))
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
