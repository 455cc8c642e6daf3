"""Profile decoding steps on a GPU: the gap between two forwards of the target, and what runs in it.

    python scripts/profile_step.py --target Qwen/Qwen3-8B --drafter Qwen/Qwen3-0.6B --out steps.jsonl

Plain decoding, vLLM's draft_model and SSD decode the same prompts, one engine after the other. A forward of the target
is a launch of a CUDA graph, the longest kind of launch in the trace; the gap is from its last kernel to the next one's
first, idle the part of it in which no kernel and no copy ran: there the device waits for the host. One JSON object a
line. On one GPU SSD's drafter needs memory beside the target: `--engine '{"gpu_memory_utilization": 0.6}'`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

GRAPH_KERNELS = 8
"""A launch that starts as many kernels is a CUDA graph's."""
ALIKE = 0.5
"""Forwards of the target take at least this part of the longest launch; a drafter's take less."""
WARM_UP_STEPS = 20
CHILDREN = multiprocessing.get_context("spawn")


class Work(NamedTuple):
    """A kernel or copy on the device, and the number of the launch that started it."""

    start_us: float
    stop_us: float
    launch: int


class Gap(NamedTuple):
    """Between two forwards of the target."""

    us: float
    idle_us: float


def gaps(work: list[Work]) -> list[Gap]:
    """The gap after each forward of the target but the last; ValueError where fewer than two are found."""
    launches = defaultdict(list)
    for item in work:
        launches[item.launch].append(item)
    graphs = [
        (min(item.start_us for item in items), max(item.stop_us for item in items))
        for items in launches.values()
        if len(items) >= GRAPH_KERNELS
    ]
    longest = max((stop - start for start, stop in graphs), default=0.0)
    forwards = sorted((start, stop) for start, stop in graphs if stop - start >= ALIKE * longest)
    if len(forwards) < 2:
        raise ValueError("the trace holds fewer than two launches of a CUDA graph of the target")
    spans = sorted((item.start_us, item.stop_us) for item in work)
    found = []
    for (_, stopped), (started, _) in pairwise(forwards):
        free_from, idle = stopped, 0.0
        for start, stop in spans:
            if stop > free_from and start < started:
                idle += max(0.0, start - free_from)
                free_from = stop
        found.append(Gap(started - stopped, idle + max(0.0, started - free_from)))
    return found


def read_trace(path: Path) -> list[Work]:
    """What ran on the device, of a trace of torch.profiler."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events = json.load(file)["traceEvents"]
    return [
        Work(event["ts"], event["ts"] + event["dur"], event["args"].get("correlation", -1))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def decode(folder: Path, speculative_config: dict[str, Any] | None, args: argparse.Namespace) -> None:
    """Leave a trace of each batch size in `folder`; in a process of its own, which gives the device back."""
    from vllm import LLM, SamplingParams

    profiler = {"profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False}
    llm = LLM(
        model=args.target,
        speculative_config=speculative_config,
        max_num_seqs=max(args.batch_sizes),
        profiler_config=profiler | {"torch_profiler_activities": ["CUDA"]},
        **args.engine,
    )
    max_tokens = (args.drafts + 1) * (WARM_UP_STEPS + args.steps)
    params = SamplingParams(temperature=args.temperature, ignore_eos=True, max_tokens=max_tokens)
    for batch_size in args.batch_sizes:
        prompts = [f"{i}. The history of the city of number {i} began when" for i in range(batch_size)]
        llm.generate(prompts, params, use_tqdm=False)
        llm.start_profile(str(batch_size), delay_iterations=WARM_UP_STEPS, max_iterations=args.steps)
        llm.generate(prompts, params, use_tqdm=False)
        llm.stop_profile()


def main() -> int:
    """Parse, refuse without a GPU, decode, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="model name or folder")
    parser.add_argument("--drafter", required=True, help="model name or folder")
    parser.add_argument("--drafts", type=int, default=5, metavar="K", help="drafts a round")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], metavar="B")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=50, help="profiled steps of each batch size")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vLLM's engines, as JSON")
    parser.add_argument("--ssd", type=json.loads, default={}, help="more of SSD's configuration, as JSON")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("profile_step: no CUDA device is visible; there is no host gap to measure without one", file=sys.stderr)
        return 2
    drafting = {"model": args.drafter, "num_speculative_tokens": args.drafts}
    systems = {
        "plain": None,
        "draft_model": {"method": "draft_model", **drafting},
        "ssd": {"method": "ssd", **drafting, **args.ssd},
    }
    for name, speculative_config in systems.items():
        with tempfile.TemporaryDirectory() as folder:
            process = CHILDREN.Process(target=decode, args=(Path(folder), speculative_config, args))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"profile_step: the engine of {name} ended with {process.exitcode}")
            for batch_size in args.batch_sizes:
                found = gaps(read_trace(next(Path(folder).glob(f"{batch_size}_*.trace.json*"))))
                row = {"system": name, "batch": batch_size, "device": torch.cuda.get_device_name(), "gaps": len(found)}
                row |= {key: statistics.median(getattr(gap, key) for gap in found) for key in Gap._fields}
                line = json.dumps(row | {"command": " ".join(sys.argv)})
                print(line, flush=True)
                if args.out:
                    with args.out.open("a") as out:
                        out.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
