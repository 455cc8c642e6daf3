"""Record a timeline of target and drafter at work, for `scripts/plot_overlap.py` and `vllm-ssd trace`.

    python scripts/record_overlap.py trace.jsonl
    python scripts/plot_overlap.py trace.jsonl --out docs/overlap.svg

One greedy request of the bundled pair, resized as in the benchmark with an expensive drafter (docs/benchmarks.md), the
target on one core and the drafter on another.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from bench_prompts import held_out_prompts
from resize_model import deepen, widen

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines import PAIR, Engine, assert_conclusive, request  # noqa: E402

from vllm_ssd.link.timeline import TRACE_ENV  # noqa: E402


def main() -> None:
    """Make the pair, run one request, and leave its timeline beside the trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--intermediate-size", type=int, default=24576, help="of the target")
    parser.add_argument("--layers", type=int, default=8, help="of the drafter")
    parser.add_argument("--num-speculative-tokens", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    args = parser.parse_args()
    *target_cores, drafter_core = sorted(os.sched_getaffinity(0))
    if not target_cores:
        raise SystemExit("target and drafter need a core each")
    prompts = held_out_prompts(seed=0)
    with tempfile.TemporaryDirectory(prefix="overlap-") as name:
        folder = Path(name)
        widen(PAIR / "target", folder / "target", args.intermediate_size, "bfloat16")
        deepen(PAIR / "drafter", folder / "drafter", args.layers, "bfloat16")
        engine = Engine(
            folder / "log",
            model=str(folder / "target"),
            dtype="bfloat16",
            speculative={
                "model": str(folder / "drafter"),
                "dtype": "bfloat16",
                "num_speculative_tokens": args.num_speculative_tokens,
                "drafter_cpus": str(drafter_core),
            },
            environment={TRACE_ENV: str(args.trace.absolute())},
        )
        try:
            engine.receive()
            for tokens in (args.tokens, args.tokens):  # the first request warms both sides up
                run = engine.generate([request(list(next(prompts)), max_tokens=tokens)])
            assert_conclusive(run)
        finally:
            engine.close()


if __name__ == "__main__":
    main()
