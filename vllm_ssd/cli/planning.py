"""The commands `vllm-ssd plan` and `vllm-ssd profile`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_ssd.cli.base import app, console, json_object, say
from vllm_ssd.config import parse_cpus
from vllm_ssd.planning import (
    DEVICES,
    Acceptance,
    Costs,
    Plan,
    Prediction,
    Profile,
    Shape,
    drafter_size_prior,
    guess_profile,
    plan,
)

PROMPTS = (
    "The history of the lighthouse on the northern cape begins with a storm that",
    "def parse_arguments(argv):\n    ",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Answer:",
    "Dear Ms. Alvarez,\n\nthank you for your letter of the third of May, in which you",
    "import json\nimport logging\n\n\nclass Settings:\n    ",
    "Ingredients for four people: 400 g of flour, two eggs,",
)
NAMES = {"plain": "plain", "sd": "stock", "ssd": "SSD"}


@app.command("plan")
def plan_command(
    profile: Annotated[
        list[Path] | None, typer.Option(help="JSON from `vllm-ssd profile`; further ones add their acceptance")
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="the target's config.json or folder, to plan without a profile")
    ] = None,
    drafter: Annotated[Path | None, typer.Option(help="the drafter's config.json or folder")] = None,
    device: Annotated[str, typer.Option(help=f"one of {', '.join(DEVICES)}")] = "H100",
    target_devices: Annotated[int, typer.Option(min=1, help="devices of the target")] = 1,
    acceptance: Annotated[float | None, typer.Option(min=0, max=1, help="acceptance rate per draft")] = None,
    verify_ms: Annotated[
        float | None, typer.Option(min=0.001, help="measured duration of a target round of one token")
    ] = None,
    draft_step_ms: Annotated[float | None, typer.Option(min=0.001, help="measured duration of a draft step")] = None,
    batch_size: Annotated[list[int], typer.Option(min=1, help="expected batch size; may be repeated")] = [1],  # noqa: B006
    temperature: Annotated[float, typer.Option(min=0, help="expected sampling temperature")] = 0.0,
    max_drafts: Annotated[int, typer.Option(min=1, max=16, help="largest K to consider")] = 8,
    v2: Annotated[
        bool, typer.Option("--v2", help="plan for vLLM's V2 runner, which verifies K drafts per row")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    plot: Annotated[Path | None, typer.Option(help="write a figure of tok/s over K and branch budget")] = None,
) -> None:
    """Predict tok/s of plain decoding, stock speculation and SSD, and recommend a setting."""
    try:
        inputs = _inputs(profile, target, drafter, device, target_devices, acceptance, verify_ms, draft_step_ms)
        sizes = _drafter_sizes(target, device, target_devices) if target and not profile else {}
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    plans = {b: plan(inputs, b, temperature, range(1, max_drafts + 1), padded=v2) for b in sorted({*batch_size})}
    if as_json:
        typer.echo(json.dumps(_as_json(inputs, plans, sizes), indent=1))
    else:
        _print(inputs, plans, sizes)
    if plot:
        _plot(plans, plot)


@app.command("profile")
def profile_command(
    target: Annotated[str, typer.Argument(help="name or path of the served model")],
    drafter: Annotated[str, typer.Argument(help="name or path of the draft model")],
    out: Annotated[Path, typer.Option(help="where to write the profile")] = Path("profile.json"),
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines of texts or lists of token ids (default: six short texts)")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="batch sizes to measure")] = "1,2,4,8",
    temperatures: Annotated[str, typer.Option(help="temperatures to measure acceptance at")] = "0",
    max_drafts: Annotated[int, typer.Option(min=1, max=16, help="largest K of interest")] = 8,
    turns: Annotated[int, typer.Option(min=2, help="number of repetitions")] = 5,
    tokens: Annotated[int, typer.Option(min=32, help="new tokens per repetition and temperature")] = 256,
    engine_args: Annotated[str, typer.Option(help="JSON of the target's vLLM engine arguments")] = "{}",
    ssd: Annotated[str, typer.Option(help="JSON of further speculative_config keys, e.g. drafter_device")] = "{}",
    target_cpus: Annotated[str, typer.Option(help="cores of a target on CPU, e.g. 0-3")] = "",
    stock: Annotated[bool, typer.Option(help="also measure stock draft_model speculation")] = True,
    together: Annotated[
        bool, typer.Option(help="run all engines at once and interleave them (they must fit in memory)")
    ] = False,
    trace: Annotated[Path | None, typer.Option(help="also write the recorded outcomes")] = None,
) -> None:
    """Measure verification, draft steps and acceptance with real engines on this machine."""
    from vllm_ssd.planning.measure import EngineFailed, Profiler, Subject

    try:
        args = json_object("--engine-args", engine_args)
        subject = Subject(
            target,
            drafter,
            [json.loads(line) for line in prompts.read_text().splitlines() if line] if prompts else PROMPTS,
            engine_args=args,
            ssd=json_object("--ssd", ssd),
            batch_sizes=tuple(int(part) for part in batch_sizes.split(",")),
            max_drafts=max_drafts,
            temperatures=tuple(float(part) for part in temperatures.split(",")),
            tokens=tokens,
            stock=stock,
            target_cpus=parse_cpus(target_cpus) if target_cpus else (),
            target_devices=args.get("tensor_parallel_size", 1) * args.get("pipeline_parallel_size", 1),
        )
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    with tempfile.TemporaryDirectory(prefix="vllm-ssd-profile-") as folder:
        try:
            with Profiler(subject, Path(folder), together) as profiler, console.status("") as status:
                profiler.run(turns, status.update)
                found = profiler.profile()
        except (EngineFailed, ValueError) as error:
            say(str(error))
            raise typer.Exit(1) from None
        if trace:
            profiler.write_trace(trace)
    out.write_text(found.to_json())
    costs, rounds = found.costs, sum(a.rounds for a in found.acceptance)
    console.print(
        f"{out}: a round of one token takes {1e3 * costs.verify_s(1, 1):.2f} ms, of {1 + max_drafts} "
        f"{1e3 * costs.verify_s(1, 1 + max_drafts):.2f} ms; a draft step {1e3 * costs.draft_step_s(1):.2f} ms for one "
        f"branch, {1e3 * costs.draft_step_s(24):.2f} ms for 24; {rounds} rounds recorded"
    )


def _inputs(
    profile: list[Path] | None,
    target: Path | None,
    drafter: Path | None,
    device: str,
    target_devices: int,
    acceptance: float | None,
    verify_ms: float | None,
    draft_step_ms: float | None,
) -> Profile:
    """The profile to plan from; raises ValueError if the options do not determine one."""
    if profile:
        found, *others = (Profile.from_json(path.read_bytes()) for path in profile)
        found = replace(found, acceptance=found.acceptance + tuple(a for other in others for a in other.acceptance))
    elif target and drafter:
        found = guess_profile(_shape(target), _shape(drafter), _device(device), target_devices, acceptance)
        found = replace(found, target=str(target), drafter=str(drafter))
    elif verify_ms and draft_step_ms and acceptance is not None:
        costs = Costs(((1, 1, verify_ms / 1e3),), ((1.0, draft_step_ms / 1e3),))
        guessed = ("how costs grow with the batch and with branches", "how well candidates cover the bonus token")
        found = Profile("target", "drafter", costs, (Acceptance.prior(acceptance),), target_devices, 1, guessed)
        return replace(found, costs=_flat(costs))
    else:
        raise ValueError("give --profile; or --target and --drafter; or --verify-ms, --draft-step-ms and --acceptance")
    if acceptance is not None:
        found = replace(found, acceptance=(Acceptance.prior(acceptance),))
    if verify_ms:
        scale = verify_ms / 1e3 / found.costs.verify_s(1, 1)
        verify = tuple((b, m, s * scale) for b, m, s in found.costs.verify)
        found = replace(found, costs=replace(found.costs, verify=verify))
    if draft_step_ms:
        scale = draft_step_ms / 1e3 / found.costs.draft_step_s(1)
        steps = tuple((n, s * scale) for n, s in found.costs.draft_step)
        found = replace(found, costs=replace(found.costs, draft_step=steps))
    return found


def _flat(costs: Costs) -> Costs:
    """Extend a single measured round to constant costs at every batch size and number of tokens."""
    ((_, _, verify_s),) = costs.verify
    return replace(costs, verify=tuple((b, m, verify_s) for b in (1, 2) for m in (1, 2)))


def _shape(path: Path) -> Shape:
    return Shape.from_config(json.loads((path / "config.json" if path.is_dir() else path).read_text()))


def _device(name: str) -> Any:
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    return DEVICES[name]


def _drafter_sizes(target: Path, device: str, target_devices: int) -> dict[str, float]:
    return drafter_size_prior(_shape(target), _device(device), target_devices)


def _speculative_config(inputs: Profile, best: Prediction, saguaro: float) -> dict[str, Any] | None:
    """The speculative_config of a prediction; None for plain decoding."""
    if best.method == "plain":
        return None
    config: dict[str, Any] = {
        "method": "draft_model",
        "model": inputs.drafter,
        "num_speculative_tokens": best.num_drafts,
    }
    if best.method == "ssd":
        config |= {"method": "ssd", "branch_budget": best.branch_budget, "on_miss": best.on_miss}
        if saguaro < 1:
            config["saguaro_c"] = saguaro
    return config


def _as_json(inputs: Profile, plans: dict[int, Plan], sizes: dict[str, float]) -> dict[str, Any]:
    found = {
        str(batch_size): {
            **{key: value for key, value in asdict(best).items()},
            "second_device_pays": best.second_device_pays,
            "speculative_config": _speculative_config(inputs, best.recommended, best.saguaro),
        }
        for batch_size, best in plans.items()
    }
    return {"guessed": inputs.guessed, "plans": found, "drafter_size_prior": sizes}


def _print(inputs: Profile, plans: dict[int, Plan], sizes: dict[str, float]) -> None:
    for batch_size, best in plans.items():
        table = Table(
            box=SIMPLE_HEAD, title=f"batch {batch_size}, temperature {best.temperature:g}", title_justify="left"
        )
        table.add_column("")
        for name in (
            "K",
            "branches",
            "on miss",
            "tok/s",
            "±",
            "per device",
            "tok/round",
            "ms/round",
            "hits",
            "late",
        ):
            table.add_column(name, justify="right")
        for p in (best.plain, best.sd, best.ssd):
            table.add_row(*_row(p, p == best.recommended))
        console.print(table)
        say(_advice(inputs, best))
    if sizes:
        say(
            f"Drafter size, a prior (scaling law and roofline, docs/theory.md): {_size(sizes['sd'])} for stock "
            f"speculation, {_size(sizes['ssd'])} for SSD."
        )
    if inputs.guessed:
        say(f"Guessed, not measured: {'; '.join(inputs.guessed)}. Measure with `vllm-ssd profile`.")


def _row(p: Prediction, recommended: bool) -> Sequence[str]:
    ssd = p.method == "ssd"
    return (
        NAMES[p.method] + (" *" if recommended else ""),
        str(p.num_drafts or ""),
        str(p.branch_budget) if ssd else "",
        str(p.on_miss) if ssd else "",
        f"{p.tokens_per_s:.1f}",
        f"{p.relative_error:.0%}",
        f"{p.per_device:.1f}",
        f"{p.tokens_per_round:.2f}",
        f"{1e3 * p.round_s:.2f}",
        f"{p.hit_rate:.0%}" if ssd else "",
        f"{p.late_rate:.0%}" if ssd else "",
    )


def _advice(inputs: Profile, best: Plan) -> str:
    config = _speculative_config(inputs, best.recommended, best.saguaro)
    lines = [f"* {json.dumps(config)}" if config else "* no speculation"]
    lines.append(
        f"  {best.confidence:.0%} sure that this beats the best other method. A second device "
        f"{'pays' if best.second_device_pays else 'does not pay'} per device: drafting is {best.draft_share:.0%} of "
        f"stock speculation's round, and SSD needs {best.break_even_share:.0%} or more."
    )
    return "\n".join(lines)


def _size(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _plot(plans: dict[int, Plan], path: Path) -> None:
    """Plot tokens per second over K: one line per branch budget, one panel per batch size."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'vllm-ssd[bench]'") from None
    figure = Figure(figsize=(4.4 * len(plans), 3.4), layout="constrained")
    for axis, (batch_size, best) in zip(figure.subplots(1, len(plans), squeeze=False)[0], plans.items()):
        by_length: dict[float, list[Prediction]] = {}
        for p in best.grid:
            by_length.setdefault(p.branch_budget / (p.num_drafts + 1), []).append(p)
        for shade, (per_length, line) in enumerate(sorted(by_length.items())):
            colour = (0.85, 0.28, 0.06, 0.3 + 0.7 * (shade + 1) / len(by_length))
            ks, rates = [p.num_drafts for p in line], [p.tokens_per_s for p in line]
            axis.plot(ks, rates, marker="o", color=colour, label=f"SSD, {per_length:g} branches a length")
        axis.axhline(best.sd.tokens_per_s, color="#8c8c8c", label=f"stock, K = {best.sd.num_drafts}")
        axis.axhline(best.plain.tokens_per_s, color="black", linewidth=0.8, label="plain")
        axis.set(title=f"batch {batch_size}", xlabel="K", ylabel="predicted tok/s", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=160)
