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
import sys
import tempfile
from pathlib import Path

from bench_prompts import held_out_prompts
from paced_models import PLUGIN, install_plugin, pace
from resize_model import deepen, widen

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from engines import PAIR, Engine, assert_conclusive, request  # noqa: E402

NUM_OTHERS = 6
TARGET_MLP, DRAFTER_LAYERS = 768, 2
"""Sizes of the bundled pair as it is."""


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
    args = parser.parse_args()
    target_core, *_, drafter_core = sorted(os.sched_getaffinity(0))
    source = held_out_prompts(seed=5)
    prompts = [list(next(source)) for _ in range(args.prompts)]
    others = [list(next(source)) for _ in range(NUM_OTHERS)]
    ratios = []
    with tempfile.TemporaryDirectory(prefix="first-tokens-") as name:
        folder = Path(name)
        widen(PAIR / "target", folder / "target", TARGET_MLP, "bfloat16")
        deepen(PAIR / "drafter", folder / "drafter", DRAFTER_LAYERS, "bfloat16")
        for model, milliseconds in zip(("target", "drafter"), args.pace):
            pace(folder / model, milliseconds)
        environment = install_plugin(folder / "plugin") | {"VLLM_PLUGINS": f"ssd,{PLUGIN}"}
        speculative = {"model": str(folder / "drafter"), "dtype": "bfloat16", "drafter_cpus": str(drafter_core)}
        speculative |= {"num_speculative_tokens": 5, "adaptive": True, **args.ssd}
        for i, prompt in enumerate(prompts):
            engine = Engine(
                folder / f"log-{i}",
                forked=False,
                model=str(folder / "target"),
                dtype="bfloat16",
                speculative=speculative,
                environment=environment,
            )
            try:
                engine.receive()
                engine.pin([target_core])
                first = rate(engine, prompt, args.tokens)
                for other in others:
                    rate(engine, other, args.tokens)
                later = rate(engine, prompt, args.tokens)
            finally:
                engine.close()
            ratios.append(first / later)
            print(f"prompt {i}: first {first:.1f} tok/s, later {later:.1f}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f}, least {min(ratios):.3f}, greatest {max(ratios):.3f}")


if __name__ == "__main__":
    main()
