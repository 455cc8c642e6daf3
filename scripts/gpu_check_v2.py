"""The V2 runner for gpu_check.py: text, hits and host gaps of plain decoding, stock speculation and SSD.

Run as a program it is the process of one engine, see `vllm_ssd.planning.engine_host`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ssd.drafter.trace import TRACE_ENV
from vllm_ssd.planning.engine_host import EngineFailed, EngineProcess, serve

if TYPE_CHECKING:
    from gpu_check_parts import Part

TIE = 0.05
"""Log-probabilities of two tokens that rounding may swap: Triton's float32 products have 10 bits of mantissa."""
PROMPT_TOKENS = 64
WARM_UP_STEPS, PROFILED_STEPS = 10, 20
SYSTEMS = ("plain", "ssd", "stock")


class Generated(NamedTuple):
    """token_ids [request][token]; gaps [request][token]: between the two likeliest log-probabilities; seconds of steps
    in which all rows decoded, and of all; counts: SSD's counters."""

    token_ids: list[list[int]]
    gaps: list[list[float]]
    steps_s: list[float]
    total_s: float
    counts: dict[str, int]


class Host:
    """One engine, in this process."""

    def start(self, speculative_config: dict[str, Any] | None, **engine_args: Any) -> bool:
        """Start the engine; whether it schedules asynchronously."""
        from vllm import EngineArgs, LLMEngine

        from vllm_ssd.compat.target import measure

        args = EngineArgs(disable_log_stats=True, speculative_config=speculative_config, **engine_args)
        self._engine = LLMEngine.from_engine_args(args)
        is_ssd = bool(speculative_config) and speculative_config["method"] == "ssd"
        self._ssd = measure.proposer(self._engine) if is_ssd else None
        self._num_requests = 0
        return bool(self._engine.vllm_config.scheduler_config.async_scheduling)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> Generated:
        """Decode all prompts at once, greedily."""
        import time

        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.CUMULATIVE
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, output_kind=kind)
        names = [str(self._num_requests + i) for i in range(len(prompts))]
        self._num_requests += len(prompts)
        before = dict(self._ssd._metrics.counts) if self._ssd else {}
        for name, prompt in zip(names, prompts):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        latest: dict[str, Any] = {}
        steps_s, began = [], time.perf_counter()
        started = began
        while self._engine.has_unfinished_requests():
            outputs: list[Any] = self._engine.step()
            now = time.perf_counter()
            steps_s += [now - began] if len(outputs) == len(prompts) else []
            began = now
            latest |= {output.request_id: output.outputs[0] for output in outputs}
        total_s = time.perf_counter() - started
        counts = {name: n - before.get(name, 0) for name, n in self._ssd._metrics.counts.items()} if self._ssd else {}
        rows = [latest[name] for name in names]
        return Generated(
            [list(row.token_ids) for row in rows], [top_two(row) for row in rows], steps_s[2:], total_s, counts
        )

    def profile(self, prompts: list[list[int]], max_tokens: int, name: str) -> None:
        """Leave a trace of some steps in the engine's `torch_profiler_dir`."""
        self._engine.start_profile(name, delay_iterations=WARM_UP_STEPS, max_iterations=PROFILED_STEPS)
        self.generate(prompts, max_tokens)
        self._engine.stop_profile()


def top_two(row: Any) -> list[float]:
    """The gap between the two likeliest tokens at each position."""
    gaps = []
    for step in row.logprobs:
        best = sorted((entry.logprob for entry in step.values()), reverse=True)
        gaps.append(best[0] - best[1] if len(best) > 1 else float("inf"))
    return gaps


def agree(token_ids: list[int], reference: list[int], gaps: list[float]) -> bool:
    """Whether a text is the reference's up to a tie, after which texts may differ."""
    for token, wanted, gap in zip(token_ids, reference, gaps):
        if token != wanted:
            return gap <= TIE
    return len(token_ids) == len(reference)


def prompts_of(number: int) -> list[list[int]]:
    """Pieces of this repository's scripts, of which the bundled pair knows the language."""
    from gpu_check_models import PAIR
    from tokenizers import Tokenizer

    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("bench_*.py")))
    ids = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json")).encode(text).ids
    stride = (len(ids) - PROMPT_TOKENS) // number
    return [ids[i * stride :][:PROMPT_TOKENS] for i in range(number)]


def run(part: Part) -> None:
    """Report all systems, whose engines start at once: first the texts of each, then the host gaps of each."""
    from gpu_check_models import write_target

    target = write_target(part.folder, part.dry_run)
    prompts, max_tokens = prompts_of(2 if part.dry_run else 8), 12 if part.dry_run else 96
    engines = {system: start(part, system, target, len(prompts)) for system in SYSTEMS}
    if part.dry_run:
        part.leave_out("stock speculation on V2", "its kernels are not interpreted")
    reference: Generated | None = None
    running = {}
    try:
        for system, process in engines.items():
            if process is None:
                continue
            try:
                found = decoded(part, process, system, prompts, max_tokens)
            except EngineFailed as error:
                if system != "stock":  # an engine of vLLM's own, here for comparison
                    raise
                part.leave_out("stock speculation on V2", str(error).splitlines()[-1])
                continue
            running[system] = process
            if system == "ssd" and reference is not None:
                compare(part, found, reference)
            reference = reference or found
        for batch in () if part.dry_run else (1, len(prompts)):
            for system, process in running.items():
                host_gap(part, process, system, prompts[:batch])
    finally:
        for process in engines.values():
            if process is not None:
                process.close()


def start(part: Part, system: str, target: str, num_prompts: int) -> EngineProcess | None:
    """The engine of one system, which answers when it is up; None for stock speculation in a dry run."""
    from gpu_check_goals import DRAFTS
    from gpu_check_models import PAIR
    from gpu_check_parts import device_args

    if part.dry_run and system == "stock":
        return None
    drafting = {"model": str(PAIR / "drafter"), "num_speculative_tokens": DRAFTS}
    ssd = {"method": "ssd", "dtype": "float32", "adaptive": False, "on_miss": "skip", "kv_cache_memory": "256MiB"}
    configs = {
        "plain": None,
        "ssd": drafting | ssd | ({} if part.dry_run else {"drafter_device": "cuda:0"}),
        "stock": drafting | {"method": "draft_model"},
    }
    process = EngineProcess(
        [__file__],
        part.folder / f"{system}.log",
        environment={
            "VLLM_PLUGINS": "ssd" if system == "ssd" else "",
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "TRITON_INTERPRET": "1" if part.dry_run else None,
            "VLLM_LOGGING_LEVEL": "WARNING",
            TRACE_ENV: str(traced(part)) if system == "ssd" else None,
        },
        name=f"the engine of {system}",
    )
    engine_args: dict[str, Any] = {"model": target, "dtype": "float32", "max_num_seqs": num_prompts, "seed": 0}
    engine_args |= {"max_model_len": 512, "enable_prefix_caching": False, "async_scheduling": True}
    engine_args |= device_args(part, memory=2 << 30, attention_backend="TRITON_ATTN")  # the one that has float32
    if not part.dry_run:
        profiler = {"profiler": "torch", "torch_profiler_dir": str(part.folder / system)}
        profiler |= {"torch_profiler_with_stack": False, "torch_profiler_activities": ["CUDA"]}
        engine_args["profiler_config"] = profiler
    process.send("start", speculative_config=configs[system], **engine_args)
    return process


def traced(part: Part) -> Path:
    """Where SSD's outcomes are recorded."""
    return part.folder / "ssd.outcomes"


def decoded(part: Part, process: EngineProcess, system: str, prompts: list[list[int]], max_tokens: int) -> Generated:
    """What one system decodes once it is up; reports its steps and counters."""
    if not process.receive():
        part.leave_out(f"{system} under asynchronous scheduling", "this vLLM switched it off")
    if not part.dry_run:
        process.call("generate", prompts=prompts, max_tokens=16)
    found = process.call("generate", prompts=prompts, max_tokens=max_tokens)
    if found.steps_s:
        part.report(
            "step", f"step of {len(prompts)} rows, {system}, one GPU", 1e3 * median(found.steps_s), "ms", system=system
        )
    speed = sum(map(len, found.token_ids)) / found.total_s
    part.report("speed", f"tokens per second of {len(prompts)} requests, {system}, one GPU", speed, system=system)
    for name in ("hits", "misses", "late"):
        if name in found.counts:
            part.report(name, f"{name}, {system}", found.counts[name], system=system)
    if "accepted_tokens" in found.counts:
        part.report("accepted", f"drafts accepted, {system}", found.counts["accepted_tokens"], system=system)
    return found


def compare(part: Part, found: Generated, reference: Generated) -> None:
    """Report how SSD's texts differ from plain decoding's, and its outcomes."""
    same = [agree(*texts) for texts in zip(found.token_ids, reference.token_ids, reference.gaps)]
    exact = sum(a == b for a, b in zip(found.token_ids, reference.token_ids))
    part.report("exact", f"texts equal to plain decoding's, of {len(same)}, ssd", exact, system="ssd")
    part.report("identity", "texts equal up to ties, ssd", sum(same) / len(same), system="ssd")
    path = traced(part)
    outcomes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if any(m and m == k for m, k, _, _ in outcomes):
        part.report("trace", "outcomes recorded", len(outcomes), trace=outcomes[:500])


def host_gap(part: Part, process: EngineProcess, system: str, prompts: list[list[int]]) -> None:
    """Report the device's time between two forwards of the target, and the part of it in which nothing ran."""
    from gpu_check_goals import DRAFTS
    from profile_step import gaps, read_trace

    batch = len(prompts)
    tokens_a_step = 1 if system == "plain" else 1 + DRAFTS
    max_tokens = tokens_a_step * (WARM_UP_STEPS + PROFILED_STEPS)
    process.call("profile", prompts=prompts, max_tokens=max_tokens, name=str(batch))
    try:
        found = gaps(read_trace(next((part.folder / system).glob(f"{batch}_*.trace.json*"))))
    except (StopIteration, ValueError) as error:
        part.leave_out(f"host gap of {system}, batch {batch}", str(error) or "the profiler left no trace")
        return
    for kind, value in (("gap", [gap.us for gap in found]), ("idle", [gap.idle_us for gap in found])):
        what = {"gap": "gap between forwards", "idle": "of it without work on the device"}[kind]
        part.report(kind, f"{what}, {system}, batch {batch}", median(value), "µs", system=system, batch=batch)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        import interpreted_v2  # noqa: F401
    from gpu_check_v2 import Host  # by the name under which the part knows what this process answers

    serve(Host)
