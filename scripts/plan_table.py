"""Write the tables of docs/planning.md: what to run, by model size, batch and number of GPUs.

    python scripts/plan_table.py [--check]

With --check nothing is written, and the exit status says whether the page is as the planner has it. The inputs, and
where they are from, are in plan_cases.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

from generated_page import fill, write_or_check
from plan_cases import (
    BATCHES,
    DRAFTERS,
    KNOWN,
    PUBLISHED,
    Published,
    Target,
    eagle_profile,
    profile,
    roofline_ms,
    targets,
)

from vllm_ssd.planning import (
    DEVICES,
    Prediction,
    Profile,
    Scenario,
    Setting,
    Simulation,
    Synthetic,
    Workload,
    predict_plain,
    predict_sd,
    predict_ssd,
)
from vllm_ssd.planning.prior import forward_s
from vllm_ssd.planning.published import PUBLISHED_SSD

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- {} by scripts/plan_table.py -->", "<!-- end of {} -->"
SYSTEMS = (
    ("H100", (("8B", 1), ("8B", 2), ("32B", 2), ("32B", 4), ("70B", 4), ("70B", 8))),
    ("H100", (("400B, 8 of 256", 8), ("400B, 1 of 128", 8))),
    ("B200", (("8B", 1), ("32B", 1), ("32B", 2), ("70B", 2), ("70B", 4))),
    ("B200", (("400B, 8 of 256", 4), ("400B, 1 of 128", 4))),
)
METHODS = ("plain", "draft_model", "EAGLE-3", "SSD")
STOCK_DRAFTS, SSD_DRAFTS, PARD_DRAFTS = range(1, 9), (1, 2, 4, 6, 8), (4, 8, 12)
CLOSE = 0.05
"""Methods within so much of the best are named with it."""
MODELS = targets()


def fastest(found: Iterable[Prediction]) -> Prediction:
    """The fastest of some predictions."""
    return max(found, key=lambda p: p.tokens_per_s)


@cache
def predict(device: str, model: str, count: int, batch: int) -> dict[str, Prediction]:
    """The best setting of each method, the target on `count` devices; SSD on one more. EAGLE-3 with the higher rate."""
    target = MODELS[model]
    own = profile(target, device, count)
    return {
        "plain": predict_plain(own, batch),
        "draft_model": fastest(predict_sd(own, target.stock, batch, k) for k in STOCK_DRAFTS),
        "EAGLE-3": eagle(device, model, count, batch, target.eagle_rates[1]),
        "SSD": best_ssd(target, device, count, batch),
    }


def eagle(device: str, model: str, count: int, batch: int, rate: float) -> Prediction:
    """The best K of an EAGLE-3 head of an acceptance rate."""
    own = eagle_profile(MODELS[model], device, count, rate)
    return fastest(predict_sd(own, own.acceptance[0], batch, k) for k in STOCK_DRAFTS)


@cache
def worse_eagle(device: str, model: str, count: int, batch: int) -> dict[str, Prediction]:
    """`predict` with the lower rate of EAGLE-3."""
    low = eagle(device, model, count, batch, MODELS[model].eagle_rates[0])
    return predict(device, model, count, batch) | {"EAGLE-3": low}


@cache
def best_ssd(
    target: Target,
    device: str,
    count: int,
    batch: int,
    parallel: bool = False,
    drafters: int = 1,
    latency_s: float = 2e-4,
) -> Prediction:
    """The best K of SSD on the V2 runner with four branches an accept length; of a parallel drafter, one to four."""
    own = profile(target, device, count, parallel)
    own = replace(own, costs=replace(own.costs, latency_s=latency_s))
    sizes = product(PARD_DRAFTS, (1, 2, 4)) if parallel else product(SSD_DRAFTS, (4,))
    settings = (Setting(batch, k, n * (k + 1), "skip", drafters, padded=True) for k, n in sizes)
    return fastest(predict_ssd(own, own.acceptance[0], setting) for setting in settings)


def names(predictions: dict[str, Prediction], rate: Callable[[Prediction], float]) -> list[str]:
    """The best method, and those about as good."""
    ranked = sorted(predictions.items(), key=lambda item: -rate(item[1]))
    return [name for name, p in ranked if rate(p) >= rate(ranked[0][1]) * (1 - CLOSE)]


def choice(device: str, model: str, count: int, batch: int, rate: Callable[[Prediction], float]) -> str:
    """The best methods, or those with the lower and those with the higher rate of EAGLE-3 where they differ."""
    low, high = (names(found(device, model, count, batch), rate) for found in (worse_eagle, predict))
    both = [name for name in low if name in high]
    return " ≈ ".join(both) if both else " ≈ ".join(low) + " or " + " ≈ ".join(high)


def speed(p: Prediction) -> float:
    """Tokens per second."""
    return p.tokens_per_s


def per_device(p: Prediction) -> float:
    """Tokens per second and device."""
    return p.per_device


def eagle_needs(device: str, model: str, count: int, batch: int, wanted: float) -> str:
    """The acceptance rate from which an EAGLE-3 head reaches `wanted` tokens per second."""
    low, high = 0.0, 1.0
    for _ in range(10):
        rate = (low + high) / 2
        reached = eagle(device, model, count, batch, rate).tokens_per_s >= wanted
        low, high = (low, rate) if reached else (rate, high)
    return "any" if high < 0.01 else f"{high:.2f}" if high < 0.995 else "none"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cases() -> Iterable[tuple[str, str, int]]:
    """Device, target and its number of devices."""
    return ((device, model, count) for device, group in SYSTEMS for model, count in group)


def what_to_run() -> str:
    """The best method by speed and per device."""
    header = ["target", "GPUs", *(f"speed, batch {b}" for b in BATCHES), *(f"per GPU, batch {b}" for b in BATCHES)]
    rows = []
    for device, model, count in cases():
        best = [choice(device, model, count, b, rate) for rate in (speed, per_device) for b in BATCHES]
        rows.append([model, f"{count} {device}", *best])
    return markdown(header, rows)


def rates() -> str:
    """All predicted rates."""
    header = ["target", "GPUs", "batch", *METHODS, "hits", "late", "EAGLE-3 as fast from"]
    rows = []
    for device, model, count in cases():
        for batch in BATCHES:
            found = predict(device, model, count, batch)
            ssd, low = found["SSD"], worse_eagle(device, model, count, batch)["EAGLE-3"]
            cells = [cell(found[method]) for method in METHODS]
            cells[2] = f"{low.tokens_per_s:.0f} · {low.per_device:.0f} to {cells[2]}"
            late = [f"{ssd.hit_rate:.0%}", f"{ssd.late_rate:.0%}"]
            needs = eagle_needs(device, model, count, batch, ssd.tokens_per_s)
            rows.append([model, f"{count} {device}", str(batch), *cells, *late, needs])
    return markdown(header, rows)


def cell(p: Prediction) -> str:
    """Tokens per second, the same per device, and K."""
    drafts = f" (K = {p.num_drafts})" if p.num_drafts else ""
    return f"{p.tokens_per_s:.0f} · {p.per_device:.0f}{drafts}"


def two_gpus() -> str:
    """Two devices: SSD with one for the drafter, or all else with both for the target."""
    rows = []
    for device, model in (("H100", "8B"), ("B200", "8B"), ("B200", "32B")):
        for batch in BATCHES:
            ssd = predict(device, model, 1, batch)["SSD"]
            found = [{**way(device, model, 2, batch), "SSD": ssd} for way in (worse_eagle, predict)]
            low, high = (f"{p['EAGLE-3'].tokens_per_s:.0f}" for p in found)
            cells = [f"{found[0][name].tokens_per_s:.0f}" for name in ("SSD", "plain", "draft_model")]
            best = list(dict.fromkeys(names(p, speed)[0] for p in found))
            rows.append([model, f"2 {device}", str(batch), *cells, f"{low} to {high}", " or ".join(best)])
    header = ["target", "GPUs", "batch", "SSD, 1 + 1", *(f"{name}, 2" for name in METHODS[:3]), "fastest"]
    return markdown(header, rows)


def variants() -> str:
    """SSD with other drafters, as ratios to one local drafter that drafts token by token."""
    others: dict[str, dict] = {
        "2 drafters": {"drafters": 2},
        "PARD drafter": {"parallel": True},
        "drafter 1 ms away": {"latency_s": 1.2e-3},
        "5 ms away": {"latency_s": 5.2e-3},
    }
    rows = []
    for model, count in (("8B", 1), ("32B", 2), ("70B", 4), ("400B, 8 of 256", 8)):
        for batch in (1, 16):
            base = predict("H100", model, count, batch)["SSD"]
            found = (best_ssd(MODELS[model], "H100", count, batch, **options) for options in others.values())
            cells = (f"{p.tokens_per_s / base.tokens_per_s:.2f} (K = {p.num_drafts})" for p in found)
            rows.append([model, f"{count} H100", str(batch), cell(base), *cells])
    return markdown(["target", "GPUs", "batch", "one drafter", *others], rows)


def prefix_cache() -> str:
    """A chat's next turn, whose prompt the drafter has or reads again."""
    rows = []
    for model, count in (("8B", 1), ("70B", 4)):
        target = MODELS[model]
        own = profile(target, "H100", count)
        for tokens in (4_000, 32_000):
            found = []
            for read in (tokens, 200):
                read_s = forward_s(DRAFTERS[target.drafter], DEVICES["H100"], 1, read, 1, tokens / 2)
                scenario = Scenario(num_drafts=5, branch_budget=24, on_miss="skip", read_s=read_s)
                found.append((1e3 * read_s, simulate(own, scenario, Workload(1, 20, 100))))
            (long_ms, anew), (short_ms, cached) = found
            times = [f"{long_ms:.0f}", f"{short_ms:.0f}", f"{anew:.0f}", f"{cached:.0f}", f"{cached / anew:.2f}"]
            rows.append([model, str(tokens), *times])
    header = [
        "target",
        "tokens of context",
        "read anew, ms",
        "cached, ms",
        "tok/s, read anew",
        "tok/s, cached",
        "ratio",
    ]
    return markdown(header, rows)


def simulate(own: Profile, scenario: Scenario, workload: Workload) -> float:
    """Tokens per second in the event simulation."""
    return Simulation(own.costs, lambda i: Synthetic(own.acceptance[0], i), scenario, workload).run().tokens_per_s


def published() -> str:
    """Published numbers, and the same methods at the same K from the roofline and the published acceptance."""
    rows = []
    for number in PUBLISHED:
        rate = from_roofline(number)
        method = f"{number.method}, K = {number.drafts}" if number.drafts else number.method
        source = f"{number.tokens_per_s:.0f}, published ({number.source})"
        error = f"{rate / number.tokens_per_s - 1:+.0%}"
        rows.append([number.target, str(number.batch), method, source, f"{rate:.0f}, simulated", error])
    return markdown(["target, 4 H100", "batch", "method", "published", "simulated", "difference"], rows)


def from_roofline(number: Published) -> float:
    """Tokens per second as published, with the roofline's times; SSD's target asks its drafter, as it did there."""
    target = replace(MODELS[number.target], factors=((1.0, 1.0),))
    own = profile(target, "H100", 4)
    if number.method == "plain":
        return predict_plain(own, number.batch).tokens_per_s
    if number.method == "draft_model":
        return predict_sd(own, target.stock, number.batch, number.drafts).tokens_per_s
    branches = 2 if number.target == "32B" else 3
    scenario = replace(PUBLISHED_SSD, num_drafts=number.drafts, fan_out=branches)
    return simulate(own, scenario, Workload(number.batch, 4 * number.batch, 300))


def roofline() -> str:
    """Known durations beside the roofline's."""
    what = {
        "8B": ("8B, 6 tokens a row, 1 H100", "measured"),
        "32B": ("32B, 5 tokens a row, 4 H100", "published"),
        "70B": ("70B, 8 tokens a row, 4 H100", "published"),
        "0.6B": ("0.6B, a draft step", "measured"),
        "1B": ("1B, a draft step", "published"),
    }
    rows = []
    for kind, (name, source) in what.items():
        known = KNOWN[kind]
        guessed = [roofline_ms(kind, x) for x, _ in known]
        cells = [
            " / ".join(f"{x:g}" for x, _ in known),
            " / ".join(f"{ms:.1f}" for _, ms in known) + f", {source}",
            " / ".join(f"{ms:.1f}" for ms in guessed),
            " / ".join(f"{ms / true - 1:+.0%}" for ms, (_, true) in zip(guessed, known)),
        ]
        rows.append([name, *cells])
    return markdown(["forward", "rows or branches", "ms", "roofline, ms", "error"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "what to run": what_to_run,
    "rates": rates,
    "two GPUs": two_gpus,
    "variants": variants,
    "prefix cache": prefix_cache,
    "published": published,
    "roofline": roofline,
}


def page(text: str) -> str:
    """`text` with each table between its markers; raises ValueError where they are missing."""
    for name, table in TABLES.items():
        text = fill(text, BEGIN.format(name), END.format(name), table())
    return text


def main() -> int:
    """Write the page, or compare it."""
    return write_or_check({PAGE: page}, __doc__)


if __name__ == "__main__":
    sys.exit(main())
