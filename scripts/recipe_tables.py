"""Write the tables of docs/recipes/ and docs/pool.md: what the planner and the simulator expect.

    python scripts/recipe_tables.py [--check]

With --check nothing is written, and the exit status says whether the pages are as planner and simulator have them. Each
table is what the command on its page gives, which is read from there.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import simulate
from generated_page import fill, write_or_check
from plan_cases import LLAMA_1B, LLAMA_8B, LLAMA_70B
from plan_table import markdown
from typer.testing import CliRunner

from vllm_ssd.cli import app
from vllm_ssd.planning import DEVICES, Profile, Shape, guess_profile, plan
from vllm_ssd.planning.published import published_profile

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- {} by scripts/recipe_tables.py -->", "<!-- end of {} -->"
CONFIGS = {"1b": LLAMA_1B, "8b": LLAMA_8B, "70b": LLAMA_70B}
"""What the commands' paths stand for: `8b/config.json` is Llama-3.1-8B's."""
LATENCIES_MS = ("0.2", "1", "2", "5", "10")


def command(text: str, program: str, part: str = "") -> list[str]:
    """Arguments of the one command of a page that runs `program`, with `part` in it, within a sentence."""
    (found,) = (c for c in re.findall(rf"`{re.escape(program)} ([^`]+)`", text) if part in " ".join(c.split()))
    return shlex.split(found)


@cache
def plans(arguments: tuple[str, ...]) -> dict[int, dict[str, Any]]:
    """What `vllm-ssd plan` says with these arguments, by batch size."""
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config))
        placed = [f"{folder}/{argument}" if argument.endswith("config.json") else argument for argument in arguments]
        done = CliRunner().invoke(app, ["plan", *placed, "--json"])
    if done.exit_code:
        raise ValueError(done.output)
    return {int(batch): found for batch, found in json.loads(done.stdout)["plans"].items()}


def methods(text: str) -> str:
    """Plain decoding, stock speculation and SSD at each batch size of the page's command."""
    arguments = command(text, "vllm-ssd plan")
    count = int(arguments[arguments.index("--target-devices") + 1]) if "--target-devices" in arguments else 1
    rows = []
    for batch, found in plans(tuple(arguments)).items():
        plain, stock, ssd = found["plain"], found["sd"], found["ssd"]
        rates = [f"{p['tokens_per_s']:.0f}" for p in (plain, stock)]
        share = ssd["per_device"] / stock["per_device"]
        speed, hits = f"**{ssd['tokens_per_s']:.0f}**", f"{ssd['hit_rate']:.0%}".replace("%", " %")
        rows.append([str(batch), *rates, speed, f"{share:.2f}", str(ssd["num_drafts"]), hits])
    gpus = "1 GPU" if count == 1 else f"{count} GPUs"
    header = ["batch", f"plain, {gpus}", f"stock, {gpus}", f"SSD, {count} + 1 GPUs"]
    return markdown([*header, "per device, SSD over stock", "K", "hits"], rows)


def replicas(text: str) -> str:
    """Four GPUs: two replicas with a drafter each, or four without; by the requests of all replicas together."""
    arguments = command(text, "vllm-ssd plan")
    found = plans(tuple(arguments))
    rows = []
    for batch in found:
        if 2 * batch not in found:
            continue
        plain, stock = (f"{4 * found[batch][name]['tokens_per_s']:.0f}" for name in ("plain", "sd"))
        ssd = f"{2 * found[2 * batch]['ssd']['tokens_per_s']:.0f}"
        rows.append([str(4 * batch), ssd, plain, stock])
    return markdown(["requests", "2 replicas with SSD", "4 plain", "4 with stock speculation"], rows)


def rates(profile: Profile, arguments: Sequence[str], batch: int, counts: Iterable[int]) -> Iterator[float]:
    """Simulated tokens per second of one replica, by the number of drafters that all replicas share; 0: stock."""
    args = simulate.parse_arguments(arguments)
    for count in counts:
        yield simulate.play("push" if count else "sd", max(count, 1), batch, profile, args).tokens_per_s


def sharing(text: str) -> str:
    """Replicas of 70B that share drafters, against a drafter each, as the page's command simulates them."""
    arguments = command(text, "python scripts/simulate.py", "--replicas")
    args, profile = simulate.parse_arguments(arguments), published_profile()
    rows = []
    for batch in args.batch_sizes:
        each, *others = rates(profile, arguments, batch, [*args.drafters, 0])
        (eighth,) = rates(profile, [*arguments, "--replicas", "8"], batch, [1])
        found = [*others[:-1], eighth, others[-1]]
        rows.append([str(batch), "1", *(f"{rate / each:.2f}" for rate in found)])
    first, *fewer = args.drafters
    header = [f"{first} drafters for {args.replicas}", *(f"{n} for {args.replicas}" for n in fewer), "1 for 8"]
    return markdown(["requests of each replica", *header, "stock speculation"], rows)


def several(text: str) -> str:
    """One target of 70B with several drafters, against one."""
    arguments = command(text, "python scripts/simulate.py", "--systems push --drafters")
    args = simulate.parse_arguments(arguments)
    rows = []
    for batch in args.batch_sizes:
        one, *others = rates(published_profile(), arguments, batch, args.drafters)
        rows.append([str(batch), "1", *(f"{rate / one:.2f}" for rate in others)])
    return markdown(["requests", *(f"{n} drafter{'s' * (n > 1)}" for n in args.drafters)], rows)


def latency(text: str) -> str:
    """One target whose drafter is further and further away, against the nearest."""
    arguments = command(text, "python scripts/simulate.py", "--latency-ms 1")
    rows = []
    (batch,) = simulate.parse_arguments(arguments).batch_sizes
    for name, profile in (("70B, 4 H100", published_profile()), ("8B, 1 H100", guess_8b())):
        near, *far = (next(rates(profile, [*arguments, "--latency-ms", ms], batch, [1])) for ms in LATENCIES_MS)
        round_ms = f"{1e3 * profile.costs.verify_s(batch, 7):.0f} ms"
        rows.append([name, round_ms, "1", *(f"{rate / near:.2f}" for rate in far)])
    return markdown(["target", "verification", *(f"{ms} ms" for ms in LATENCIES_MS)], rows)


def guess_8b() -> Profile:
    """8B and 1B on an H100 each, as the planner guesses them."""
    return guess_profile(Shape.from_config(LLAMA_8B), Shape.from_config(LLAMA_1B), DEVICES["H100"], 1, None)


def shared(text: str) -> str:
    """The recipe's replicas together: a drafter each, its drafters for all, and stock speculation."""
    (config,) = (json.loads(found) for found in re.findall(r"--speculative-config '(\{.*?\})'", text, re.DOTALL))
    (replicas,) = map(int, re.findall(r"--data-parallel-size (\d+)", text))
    profile = guess_8b()
    drafts, branches, count = config["num_speculative_tokens"], config["branch_budget"], len(config["drafters"])
    stock = plan(profile, 1).sd.num_drafts
    arguments = (
        f"--profile guess --replicas {replicas} --drafts {drafts} --branches {branches} --requests 2 --tokens 256"
    )
    rows = []
    for batch in (1, 8, 32):
        found = rates(profile, [*arguments.split(), f"--stock-drafts={stock}"], batch, (replicas, count, 0))
        rows.append([str(batch), *(f"{replicas * rate:.0f}" for rate in found)])
    header = [f"{replicas} drafters, {2 * replicas} GPUs", f"{count} drafters, {replicas + count} GPUs"]
    return markdown(["requests of each replica", *header, f"stock speculation, {replicas} GPUs"], rows)


PAGES: dict[str, dict[str, Callable[[str], str]]] = {
    "recipes/8b-two-gpus.md": {"methods": methods},
    "recipes/70b-4-plus-1.md": {"methods": methods},
    "recipes/replicas.md": {"replicas": replicas},
    "recipes/shared-drafters.md": {"shared drafters": shared},
    "pool.md": {"several drafters": several, "replicas that share": sharing, "latency": latency},
}


def page(name: str, text: str) -> str:
    """`text` of a page with its tables between their markers; raises ValueError where they are missing."""
    for title, table in PAGES[name].items():
        text = fill(text, BEGIN.format(title), END.format(title), table(text))
    return text


def main() -> int:
    """Write the pages, or compare them."""
    return write_or_check({DOCS / name: partial(page, name) for name in PAGES}, __doc__)


if __name__ == "__main__":
    sys.exit(main())
