"""Accepted drafts at temperature 1 under top-k and top-p: stock speculation, and SSD with and without cutting its
proposal as the request is cut.

Prompts are from files that the bundled pair was not trained on. With `on_miss` "wait" and rounds that are stretched,
nearly every round of SSD carries drafts that were drawn from the drafter's q, so that acceptance is a matter of q
alone. Speed is not measured here. `--computed` runs no engine: it computes the chance that the first draft is accepted
from the logits of both models after every token of the prompts.
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
from bench_systems import PAIR, choose_cores, console, run_script, start_pair

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
TOP_M = 64
"""Tokens of a proposal, the default."""


class Worker:
    """The host of one engine, see `engine_host.serve`."""

    def start(self, speculative_config: dict[str, Any], cut: bool) -> None:
        """Start an engine; unless `cut`, the drafter is not told of top-k and top-p."""
        from vllm_ssd.compat.target import runner_v1
        from vllm_ssd.link.protocol import ALL_TOKENS

        runner_v1.repair_cpu_sampling()  # as SSD does for itself
        if not cut:
            runner_v1.truncation_of = lambda params: ALL_TOKENS
        self._engine = start_pair(speculative_config, disable_log_stats=False)

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


def compute(prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The chance that a first draft is accepted, sum of min(p, q), of every system that has one q a setting."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    from vllm_ssd.drafter.truncation import truncate, truncation_row
    from vllm_ssd.link.protocol import Truncation

    def logits_of(name: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32)
        with torch.inference_mode():
            return model(torch.tensor(prompts)).logits.flatten(0, 1)

    target, drafter = logits_of("target"), logits_of("drafter")
    values, ids = drafter.topk(TOP_M)
    uncut, found = torch.softmax(values, -1), []
    for sampling in SETTINGS:
        k = torch.full((len(target),), sampling.get("top_k", target.shape[1]))
        top_p = torch.full((len(target),), sampling.get("top_p", 1.0))
        p = torch.softmax(apply_top_k_top_p_pytorch(target.clone(), k, top_p), -1).gather(1, ids)
        rows = np.tile(np.array(truncation_row(Truncation(**sampling)), np.float32), (len(target), 1))
        proposals = {
            "stock": torch.eye(TOP_M)[0].expand_as(uncut),
            "stock, probabilistic": uncut,
            "SSD, q uncut": uncut,
            "SSD": torch.from_numpy(truncate(uncut.numpy(), rows)),
        }
        for name, q in proposals.items():
            accepted = float(torch.minimum(p, q).sum(1).mean())
            found.append({"system": name, "sampling": sampling, "contexts": len(target), "first_accepted": accepted})
            console.print(f"{name:22} {json.dumps(sampling):30} first draft accepted {accepted:.3f}")
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_sampling.json")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each setting")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated for each prompt")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings, from the first")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--computed", action="store_true", help="compute the acceptance of first drafts; no engines")
    args = parser.parse_args()
    args.target_cores = choose_cores(None, True)[0]
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = list(islice(held_out_prompts(0), args.prompts))
    result = {"environment": environment(sys.argv), "points": []}
    if args.computed:
        result["points"] = compute(prompts)
        (args.out / "bench_sampling.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory(prefix="bench-sampling-") as folder:
        for name in args.systems:
            result["points"] += measure(name, args, Path(folder), prompts)
            (args.out / "bench_sampling.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if WORKER in sys.argv:
        serve(Worker)
    else:
        run_script(main)
