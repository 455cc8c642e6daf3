"""Measure what it is worth that the drafter foresees the target's noise, on the V1 runner on a CPU.

    python scripts/bench_foresee.py OUT.json

The same prompts alternate with and without a seed of their own on one engine with the expensive drafter of
docs/benchmarks.md: with a seed, vLLM draws with a generator that the drafter does not know. One request at a time,
target and drafter on a core each, without n-gram and just-in-time drafts, K fixed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
from bench_prompts import held_out_prompts
from bench_report import environment
from expensive_pair import Engine, add_sizes, assert_conclusive, request, started

WARM_UP = 4
"""Prompts whose requests are not counted."""


def measure(engine: Engine, prompts: list[list[int]], temperature: float, tokens: int) -> dict:
    """Rates and counts with foreseen and with unknown noise, and the ratios of the rates, prompt by prompt."""
    rates: dict[str, list[float]] = {"foreseen": [], "unknown": []}
    counts = {name: Counter() for name in rates}
    for i, prompt in enumerate(prompts):
        for name in sorted(rates, reverse=bool(i % 2)):
            seed = i if name == "unknown" else None
            began = time.perf_counter()
            run = engine.generate([request(prompt, temperature=temperature, max_tokens=tokens, seed=seed)])
            if i >= WARM_UP:
                rates[name].append(tokens / (time.perf_counter() - began))
                counts[name].update({key: value for key, value in run.counts.items() if value})
    ratios = [foreseen / unknown for foreseen, unknown in zip(rates["foreseen"], rates["unknown"])]
    found = {name: summary(rates[name], counts[name]) for name in rates}
    return {"temperature": temperature, **found, "ratio": statistics.quantiles(ratios, n=4)}


def summary(rates: list[float], counts: Counter) -> dict:
    """Median tok/s, hit rate of outcomes, drafts per hit and the share of drafts that are accepted."""
    return {
        "tokens_per_second": statistics.median(rates),
        "hit_rate": counts["hits"] / (counts["hits"] + counts["misses"]),
        "late_rate": counts["late"] / (counts["hits"] + counts["misses"] + counts["late"]),
        "drafts_per_hit": counts["draft_tokens"] / counts["hits"],
        "accepted": counts["accepted_tokens"] / counts["draft_tokens"],
    }


def main() -> None:
    """Make the pair, measure each temperature, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8, 1.0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    add_sizes(parser)
    args = parser.parse_args()
    source = held_out_prompts(seed=1)
    prompts = [list(next(source)) for _ in range(args.prompts)]
    points = []
    with started(args, {"on_miss": "skip"}, forked=False) as engine:
        engine.pin([min(os.sched_getaffinity(0))])
        for temperature in args.temperatures:
            points.append(measure(engine, prompts, temperature, args.tokens))
            print(msgspec.json.format(msgspec.json.encode(points[-1]), indent=2).decode(), flush=True)
        assert_conclusive(engine.generate([request(prompts[0], temperature=0.8, max_tokens=args.tokens)]))
    args.out.write_bytes(msgspec.json.encode({"environment": environment(sys.argv), "points": points}))


if __name__ == "__main__":
    main()
