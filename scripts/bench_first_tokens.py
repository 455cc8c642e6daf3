"""Measure how fast a server's first tokens come, against the same prompt after six others.

    python scripts/bench_first_tokens.py --ssd '{"on_miss": "skip"}'

Each prompt is the first one of an engine of its own, greedy, 200 tokens, on the V1 runner on a CPU. Forwards of the
bundled pair have a fixed duration (paced_models.py), so the machine's noise stays out of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics

from bench_prompts import held_out_prompts
from expensive_pair import Engine, add_sizes, assert_conclusive, request, started

NUM_OTHERS = 6
AS_BUNDLED = {"intermediate_size": 768, "layers": 2}


def rate(engine: Engine, prompt: list[int], num_tokens: int) -> float:
    """Tokens per second after the first one."""
    run = engine.generate([request(prompt, max_tokens=num_tokens)])
    assert_conclusive(run)
    return (num_tokens - 1) / sum(run.seconds[1:])


def main() -> None:
    """Start an engine for each prompt, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ssd", type=json.loads, default={}, help="JSON of further speculative_config keys")
    parser.add_argument("--pace", nargs=2, type=float, default=[32.0, 8.0], metavar=("TARGET_MS", "DRAFTER_MS"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    add_sizes(parser)
    parser.set_defaults(**AS_BUNDLED, num_speculative_tokens=5)
    args = parser.parse_args()
    source = held_out_prompts(seed=5)
    prompts = [list(next(source)) for _ in range(args.prompts)]
    others = [list(next(source)) for _ in range(NUM_OTHERS)]
    ratios = []
    for i, prompt in enumerate(prompts):
        with started(args, {"adaptive": True, **args.ssd}, args.pace, forked=False) as engine:
            engine.pin([min(os.sched_getaffinity(0))])
            first = rate(engine, prompt, args.tokens)
            for other in others:
                rate(engine, other, args.tokens)
            later = rate(engine, prompt, args.tokens)
        ratios.append(first / later)
        print(f"prompt {i}: first {first:.1f} tok/s, later {later:.1f}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f}, least {min(ratios):.3f}, greatest {max(ratios):.3f}")


if __name__ == "__main__":
    main()
