"""Record a timeline of target and drafter at work, for `scripts/plot_overlap.py` and `vllm-ssd trace`.

    python scripts/record_overlap.py trace.jsonl
    python scripts/plot_overlap.py trace.jsonl --out docs/overlap.svg

One greedy request of the bundled pair, resized as in the benchmark with an expensive drafter (docs/benchmarks.md), the
target on one core and the drafter on another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench_prompts import held_out_prompts
from expensive_pair import add_sizes, assert_conclusive, request, started

from vllm_ssd.link.timeline import TRACE_ENV


def main() -> None:
    """Make the pair, run one request, and leave its timeline beside the trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    add_sizes(parser)
    parser.add_argument("--tokens", type=int, default=160)
    args = parser.parse_args()
    prompts = held_out_prompts(seed=0)
    with started(args, {}, environment={TRACE_ENV: str(args.trace.absolute())}) as engine:
        for tokens in (args.tokens, args.tokens):  # the first request warms both sides up
            run = engine.generate([request(list(next(prompts)), max_tokens=tokens)])
        assert_conclusive(run)


if __name__ == "__main__":
    main()
