"""Accepted drafts at temperature 1 under top-k and top-p: stock speculation, and SSD with and without cutting its
proposal as the request is cut.

Prompts are from files that the bundled pair was not trained on. With `on_miss` "wait" and rounds that are stretched,
nearly every round of SSD carries drafts that were drawn from the drafter's q, so that acceptance is a matter of q
alone. Speed is not measured here.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from bench_prompts import held_out_prompts
from bench_report import environment
from bench_systems import PAIR, choose_cores, console, run_script

from vllm_ssd.planning.engine_host import EngineProcess, serve, threads_on

SETTINGS = [{"top_k": 20, "top_p": 0.8}, {"top_p": 0.5}, {"top_p": 0.95}, {}]
"""Sampling parameters beside temperature 1."""
DRAFTING = {"model": str(PAIR / "drafter"), "num_speculative_tokens": 4}
SSD = DRAFTING | {"method": "ssd", "on_miss": "wait", "adaptive": False, "dtype": "float32"}
SYSTEMS = {
    "stock": DRAFTING | {"method": "draft_model"},
    "stock, probabilistic": DRAFTING | {"method": "draft_model", "draft_sample_method": "probabilistic"},
    "SSD, q uncut": SSD,
    "SSD": SSD,
}
WORKER = "--worker"
ROUND_S = 0.02
"""Length of a round, in which the drafter grows the next tree."""
STARTUP_TIMEOUT_S = 300.0


class Worker:
    """The host of one engine, see `engine_host.serve`."""

    def start(self, speculative_config: dict[str, Any], cut: bool) -> None:
        """Start an engine; unless `cut`, the drafter is not told of top-k and top-p."""
        from vllm import EngineArgs, LLMEngine

        from vllm_ssd.compat.target import runner_v1
        from vllm_ssd.link.protocol import ALL_TOKENS

        runner_v1.repair_cpu_sampling()  # as SSD does for itself
        if not cut:
            runner_v1.truncation_of = lambda params: ALL_TOKENS
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(PAIR / "target"),
                dtype="float32",
                enforce_eager=True,
                max_model_len=512,
                max_num_seqs=8,
                kv_cache_memory_bytes=128 << 20,
                disable_log_stats=False,
                enable_prefix_caching=False,
                speculative_config=speculative_config,
            )
        )

    def generate(self, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]) -> dict[str, float]:
        """What vLLM's counters of drafts, and accepted ones, grew by at temperature 1."""
        from vllm import SamplingParams

        before = self._counts()
        params = SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True, **sampling)
        for i, prompt in enumerate(prompts):
            self._engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            began = time.perf_counter()
            self._engine.step()
            time.sleep(max(0.0, ROUND_S - (time.perf_counter() - began)))
        return {name: value - before.get(name, 0) for name, value in self._counts().items()}

    def _counts(self) -> dict[str, float]:
        from vllm.v1.metrics.reader import Counter, Vector

        counts: dict[str, float] = {}
        for metric in self._engine.get_metrics():
            if isinstance(metric, Counter):
                counts[metric.name] = metric.value
            elif isinstance(metric, Vector):
                counts |= {f"{metric.name} {i}": value for i, value in enumerate(metric.values)}
        return counts


def measure(name: str, args: argparse.Namespace, folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Acceptance of one system under every setting."""
    engine = EngineProcess(
        [str(Path(__file__)), WORKER],
        folder / f"{len(list(folder.iterdir()))}.log",
        environment={"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_USE_V2_MODEL_RUNNER": "0"} | threads_on(args.target_cores),
        name=name,
    )
    found = []
    try:
        engine.send("start", speculative_config=SYSTEMS[name], cut=name != "SSD, q uncut")
        engine.receive(STARTUP_TIMEOUT_S)
        for sampling in SETTINGS[: args.settings]:
            counts = engine.call("generate", prompts=prompts, max_tokens=args.tokens, sampling=sampling)
            rounds = counts["vllm:spec_decode_num_drafts"]
            if not rounds:
                raise SystemExit(f"bench_sampling: {name} drafted nothing")
            row = {
                "system": name,
                "sampling": sampling,
                "rounds": int(rounds),
                "first_accepted": counts["vllm:spec_decode_num_accepted_tokens_per_pos 0"] / rounds,
                "accepted_per_round": counts["vllm:spec_decode_num_accepted_tokens"] / rounds,
            }
            found.append(row)
            console.print(
                f"{name:22} {json.dumps(sampling):30} {row['rounds']:6} rounds, first draft accepted "
                f"{row['first_accepted']:.3f}, {row['accepted_per_round']:.2f} of 4 drafts a round"
            )
    finally:
        engine.close()
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_sampling.json")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each setting")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated for each prompt")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings, from the first")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    args = parser.parse_args()
    args.target_cores = choose_cores(None, True)[0]
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = list(islice(held_out_prompts(0), args.prompts))
    result = {"environment": environment(sys.argv), "points": []}
    with tempfile.TemporaryDirectory(prefix="bench-sampling-") as folder:
        for name in args.systems:
            result["points"] += measure(name, args, Path(folder), prompts)
            (args.out / "bench_sampling.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if WORKER in sys.argv:
        serve(Worker)
    else:
        run_script(main)
