"""The process of one part of gpu_check.py: `python gpu_check_parts.py PART --folder FOLDER [--dry-run]`.

It appends a JSON line for every number to FOLDER/rows.jsonl as soon as it has it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
TRACE = Path(__file__).with_name("gpu_check_trace.jsonl")
"""Outcomes of the bundled pair, recorded at K = 5: drafts, accept length, rank of t* or null, after a hit."""
KERNEL_TESTS = ("draft_logits", "sample", "noise", "tree_attention", "pages", "lookup", "engine_on_device")
UTILIZATION = 0.05
"""The share of the GPU that has to be free for vLLM to start: what it takes for its KV pages is said in bytes."""
TARGET_TOKENS = 24
"""Tokens that are decoded for each time of a verification."""


@dataclass(frozen=True)
class Part:
    """What a part is given. folder: for its files, removed afterwards."""

    folder: Path
    dry_run: bool
    began: float = field(default_factory=time.monotonic)

    def report(self, kind: str, what: str, value: float | int | str, unit: str = "", **sizes: Any) -> None:
        """Report a number; see `gpu_check_goals.Row`."""
        at_s = round(time.monotonic() - self.began, 1)
        row = {"kind": kind, "what": what, "value": value, "unit": unit, "at_s": at_s, **sizes}
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def leave_out(self, what: str, reason: str) -> None:
        """Report that something is not measured."""
        self.report("left out", f"not measured: {what}", reason)


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


# ---- kernels -----------------------------------------------------------------------------------------------


class Outcomes:
    """A pytest plugin that reports each file's tests once all of them have run."""

    def __init__(self, part: Part) -> None:
        self._part, self._counts, self._file, self._began = part, Counter(), "", time.monotonic()
        self.failed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test: its call, or its set-up where that failed or skipped it."""
        name = Path(report.location[0]).stem
        if name != self._file:
            self.flush()
            self._file, self._began = name, time.monotonic()
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
            self.failed += report.outcome == "failed"

    def flush(self) -> None:
        """Report the file so far."""
        if self._counts:
            seconds = time.monotonic() - self._began
            counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self._counts.items()))
            self._part.report("kernel_tests", f"{self._file}: {counts}", seconds, "s", **self._counts)
        self._counts.clear()


def kernels(part: Part) -> None:
    """The kernels against their references: natively, in bfloat16 too, where there is a GPU, else interpreted."""
    import pytest

    tests = KERNEL_TESTS[:1] if part.dry_run else KERNEL_TESTS
    files = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in tests]
    outcomes = Outcomes(part)
    status = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files], plugins=[outcomes])
    outcomes.flush()
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {status!r}")
    part.report("failed_tests", "kernel tests that failed", outcomes.failed)


# ---- costs -------------------------------------------------------------------------------------------------


def costs(part: Part) -> None:
    """T_v of a target of 8B parameters and t_d of drafters of 0.6B and 1B, each alone on the device."""
    from gpu_check_goals import DRAFTS
    from gpu_check_models import write_shape

    drafters = ("0.6B", "1B")
    if not has_vllm():
        part.leave_out("verifications of the target", "vLLM is not installed")
        for model in drafters:
            draft_steps(part, model, lambda steps, model=model: own_steps(part, model, steps))
        return
    from vllm_ssd.planning.engine_host import EngineProcess
    from vllm_ssd.planning.worker import Decode, Steps, Task

    def engine(method: str, model: str, **engine_args: Any) -> EngineProcess:
        environment = {"VLLM_PLUGINS": "", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        folder = write_shape(model, part.folder, part.dry_run)
        args = {"model": folder, "load_format": "dummy", "max_model_len": 512, **engine_args}
        process = EngineProcess(["-m", "vllm_ssd.planning"], part.folder / f"{model}.log", environment=environment)
        process.send("start", task=Task(method, args))
        return process

    batches, numbers = ((1, 2), (DRAFTS,)) if part.dry_run else ((1, 8, 32), (0, 2, DRAFTS))
    engines = {
        model: engine(
            "steps",
            model,
            max_num_seqs=8,
            enforce_eager=True,
            tree_attention=True,
            **memory_args(part, 2 << 30),
        )
        for model in drafters
    }
    graphs = {} if part.dry_run else {"cudagraph_mode": "FULL"}  # of any number of tokens a row
    sizes = sorted({batch * (1 + drafts) for batch in batches for drafts in numbers})
    target = engine(
        "verify",
        "8B",
        max_num_seqs=max(batches),
        speculative_config={
            "method": "custom_class",
            "model": "vllm_ssd.compat.target.measure.ConstantDrafts",
            "num_speculative_tokens": DRAFTS,
        },
        enable_prefix_caching=False,
        **device_args(part, memory=3 << 30, **graphs, cudagraph_capture_sizes=sizes),
    )
    for model, drafter in engines.items():
        drafter.receive()
        draft_steps(part, model, lambda steps, drafter=drafter: drafter.call("run", request=Steps(*steps)))
        drafter.close()
    target.receive()
    for drafts in numbers:
        for batch in batches:
            prompt = [drafts, *range(2, 34)]  # the first token says how many drafts to hand over
            steps_s = target.call("run", request=Decode([prompt] * batch, 8 if part.dry_run else TARGET_TOKENS))
            what = f"verification, 8B target, batch {batch}, {1 + drafts} tokens a row"
            part.report("verify", what, 1e3 * median(steps_s), "ms", batch=batch, tokens=1 + drafts)
    target.close()


def memory_args(part: Part, memory: int) -> dict[str, Any]:
    """vLLM's arguments for KV pages of so many bytes, fewer in a dry run."""
    if part.dry_run:
        return {"kv_cache_memory_bytes": 64 << 20}
    return {"kv_cache_memory_bytes": memory, "gpu_memory_utilization": UTILIZATION}


def device_args(part: Part, memory: int, attention_backend: str | None = None, **graphs: Any) -> dict[str, Any]:
    """vLLM's arguments for the device: on a GPU CUDA graphs of whole steps, without the compiler's minutes.

    graphs: settings of vLLM's `CompilationConfig`; by default steps that only decode are captured.
    """
    if part.dry_run:
        return {"enforce_eager": True, **memory_args(part, memory)}
    return {
        **memory_args(part, memory),
        "attention_backend": attention_backend,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", **graphs},
    }


def draft_steps(part: Part, model: str, run: Callable[[tuple[int, int, int]], list[float]]) -> None:
    """Report the time of a step over so many branches; `run` takes requests, branches of each and drafts."""
    from gpu_check_goals import DRAFTS

    for requests, branches in ((1, 8), (2, 4)) if part.dry_run else ((1, 1), (1, 8), (1, 24), (4, 24), (8, 24)):
        value = 1e3 * median(run((requests, branches, DRAFTS)))
        total = requests * branches
        what = f"draft step, {model} drafter, {total} branches of {requests} requests"
        part.report("draft_step", what, value, "ms", model=model, branches=total, requests=requests)


def own_steps(part: Part, model: str, steps: tuple[int, int, int]) -> list[float]:
    """As the profiler's engine of a drafter, over a model made of torch and our kernels."""
    from gpu_check_drafter import step_times

    return step_times(model, part.dry_run, *steps)


# ---- the rest ----------------------------------------------------------------------------------------------


def drafter(part: Part) -> None:
    """The drafter's engine over a recorded trace."""
    os.environ.update(VLLM_PLUGINS="", VLLM_USE_V2_MODEL_RUNNER="0", VLLM_LOGGING_LEVEL="WARNING")
    from gpu_check_drafter import run

    run(part, TRACE)


def end_to_end(part: Part) -> None:
    """Plain decoding, stock speculation and SSD on the V2 runner, all on one device."""
    if not has_vllm():
        part.leave_out("text, hits and host gaps", "vLLM is not installed")
        return
    from gpu_check_v2 import run

    run(part)


def benchmarks(part: Part) -> None:
    """The benchmarks of the kernels, those that goals are about first."""
    import bench_kernels

    if part.dry_run:
        from gpu_check_toys import benchmarks_on_cpu

        sizes, bandwidth = [(1, 64, 4)], 1e9
        with benchmarks_on_cpu():
            run_benchmarks(part, bench_kernels, sizes, bandwidth)
        return
    sizes = [(8, 8192, 24), (32, 8192, 24), (1, 8192, 24), (8, 32768, 24), (8, 1024, 24), (8, 8192, 8), (8, 8192, 48)]
    bandwidth = bench_kernels.copy_bandwidth()
    part.report("copy_bandwidth", "copy bandwidth", bandwidth / 1e9, "GB/s")
    run_benchmarks(part, bench_kernels, sizes, bandwidth)


def run_benchmarks(part: Part, bench: Any, sizes: list[tuple[int, int, int]], bandwidth: float) -> None:
    """Report attention for all sizes; pages, lookup and sampling for all numbers of requests."""
    for requests, context, branches in sizes:
        for model in list(bench.HEADS)[: 1 if part.dry_run else None]:
            for row in bench.bench_attention(model, requests, context, branches, bandwidth):
                way = row.pop("way")
                what = f"{way}, {model}, {requests} requests, {context} tokens, {branches} branches"
                if "us" not in row:
                    part.leave_out(what, str(row["not measured"]))
                    continue
                part.report("tree_attention", what, row.pop("us"), "µs", way=way, **row)
        if any(size[0] == requests for size in sizes[: sizes.index((requests, context, branches))]):
            continue
        pages, found = bench.bench_pages(requests), bench.bench_lookup(requests)
        name = f"{requests} requests"
        part.report("pages", f"expand + copy_pages + commit, {name}", pages["expand+copy+commit_us"], "µs", **pages)
        part.report("lookup", f"lookup, {name}", found["us"], "µs", requests=requests)
        logits_us = found["write_draft_logits_us"]
        part.report("write_draft_logits", f"write_draft_logits, {name}", logits_us, "µs", requests=requests)
        drawn = bench.bench_sample((1 if part.dry_run else 24) * requests)
        rows = drawn["rows"]
        part.report("sample", f"sample, {rows} rows", drawn["us"], "µs", rows=rows)
        part.report("sample_foreseen", f"sample, noise foreseen, {rows} rows", drawn["foreseen_us"], "µs", rows=rows)


PARTS = {function.__name__: function for function in (kernels, costs, drafter, end_to_end, benchmarks)}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    if importlib.util.find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # vLLM takes for granted that it is installed
    if args.dry_run:
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
        if args.part == "benchmarks":
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    PARTS[args.part](Part(args.folder, args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
