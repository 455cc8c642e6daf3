"""The drafter's engine for gpu_check.py: steps captured, replayed and timed over a trace of outcomes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gpu_check_goals import DRAFTS
from gpu_check_models import MAX_MODEL_LEN, Llama, shape_config, write_shape

from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.server import build_engine
from vllm_ssd.link.protocol import Push, unpack_ids
from vllm_ssd.policy import FanOut

if TYPE_CHECKING:
    from gpu_check_parts import Part

BRANCHES = 24
MODEL = "0.6B"
KV_BYTES = 12 << 30
TREES = 5


class Counters:
    """How often CUDA graphs were captured and replayed."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count while the context lasts, wherever the graphs come from."""
        graph_class: Any = torch.cuda.CUDAGraph
        capture, replay = graph_class.capture_begin, graph_class.replay

        def capture_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
            self.captured += 1
            capture(graph, *args, **kwargs)

        def replay_counted(graph: Any) -> None:
            self.replayed += 1
            replay(graph)

        graph_class.capture_begin, graph_class.replay = capture_begin, replay_counted
        try:
            yield
        finally:
            graph_class.capture_begin, graph_class.replay = capture, replay


class Request:
    """A request as its target sees it: committed tokens, drafts under verification, what was pushed for this round."""

    def __init__(self, name: str, prompt: list[int], vocab_size: int, trace: list[list], seed: int) -> None:
        self.name, self.tokens, self.drafts = name, prompt, list[int]()
        self.hits = self.misses = 0
        self._vocab_size = vocab_size
        self._trace, self._next, self._random = trace, seed * 37, random.Random(seed)
        self._branches: dict[tuple[int, int], list[int]] = {}

    def absorb(self, push: Push | None) -> None:
        """Keep the branches that answer the current length, the likeliest of each accept length first."""
        for block in push.blocks if push else []:
            if block.request_id == self.name and block.length == len(self.tokens):
                for i, outcome in enumerate(unpack_ids(block.outcomes).reshape(-1, 2).tolist()):
                    self._branches.setdefault(tuple(outcome), []).extend(block.drafts(i))

    def advance(self, engine: DraftEngine) -> None:
        """Tell the engine of the next outcome of the trace, as far as its branches allow."""
        _, accepted, rank, _ = self._trace[self._next % len(self._trace)]
        self._next += 1
        accepted = min(accepted, len(self.drafts))
        predicted = [bonus for k, bonus in self._branches if k == accepted]
        bonus = self._random.randrange(self._vocab_size)
        if rank is not None and rank < len(predicted):
            bonus = predicted[rank]
        drafts = self._branches.get((accepted, bonus), [])
        self.hits, self.misses = self.hits + bool(drafts), self.misses + (not drafts)
        emitted = [*self.drafts[:accepted], bonus]
        self.tokens, self.drafts, self._branches = self.tokens + emitted, drafts, {}
        engine.advance(self.name, 0, len(self.tokens), emitted, drafts, num_drafts=DRAFTS)


def own_model(shape: str, dry_run: bool) -> Llama:
    """A model of a shape, made of torch and our kernels."""
    device = torch.device("cpu" if dry_run else "cuda")
    dtype = torch.float32 if dry_run else torch.bfloat16
    config = shape_config(shape, dry_run)
    page_bytes = 4 * config["num_hidden_layers"] * Llama.page_size * config["num_key_value_heads"] * config["head_dim"]
    return Llama(config, (64 << 20 if dry_run else KV_BYTES) // page_bytes, device, dtype)


def make_engine(model: Any, requests: int, branches: int) -> DraftEngine:
    """As the drafter's server makes it, warm."""
    engine = build_engine(
        model,
        FanOut(DRAFTS, None, branches),
        num_speculative_tokens=DRAFTS,
        max_num_seqs=requests,
        max_branches=branches,
        max_fan_out=branches,
        top_m=64,
        seed=0,
    )
    engine.warm_up()
    return engine


def step_times(shape: str, dry_run: bool, requests: int, branches: int, num_drafts: int) -> list[float]:
    """Seconds of a step over all branches, the mean of each of some trees: the profiler's measure without vLLM."""
    from vllm_ssd.planning.worker import DrafterEngine, Steps

    host = DrafterEngine.__new__(DrafterEngine)  # around a model that vLLM has not loaded
    host._model = own_model(shape, dry_run)  # pyright: ignore[reportAttributeAccessIssue]
    return host.run(Steps(requests, branches, num_drafts))


def run(part: Part, trace: Path) -> None:
    """Report steps and graphs for requests and contexts of growing size."""
    from gpu_check_parts import has_vllm, memory_args

    rounds = [json.loads(line) for line in trace.read_text().splitlines()]
    part.report("trace", "recorded outcomes that are replayed", len(rounds), trace=rounds)
    counters = Counters()
    with counters.watching():
        if has_vllm():
            from vllm_ssd.compat.drafter.draft_model import DraftModel

            model: Any = DraftModel(
                model=write_shape(MODEL, part.folder, part.dry_run),
                tree_attention=True,
                load_format="dummy",
                enforce_eager=True,
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=8,
                **memory_args(part, KV_BYTES),
            )
        else:
            part.leave_out("the drafter under vLLM", "vLLM is not installed: its model is made of torch operations")
            model = own_model(MODEL, part.dry_run)
        sizes = [(2, 80)] if part.dry_run else [(1, 1024), (8, 1024), (1, 8192), (8, 8192)]
        for requests, context in sizes:
            one_size(part, model, counters, rounds, requests, context)


def one_size(part: Part, model: Any, counters: Counters, trace: list[list], num_requests: int, context: int) -> None:
    """Open requests of `context` tokens and take them through the trace, each round once its trees are complete."""
    name = f"{num_requests} requests of {context} tokens"
    began, captured = time.perf_counter(), counters.captured
    engine = make_engine(model, num_requests, BRANCHES)
    numbers = np.random.default_rng(0)
    requests = []
    for i in range(num_requests):
        prompt = numbers.integers(model.vocab_size, size=context).astype(np.int32)
        requests.append(Request(str(i), prompt.tolist(), model.vocab_size, trace, i))
        engine.open(str(i), 0, prompt, 0.0, DRAFTS)
    grow(engine, requests, {})
    part.report("opened", f"start and prompts, {name}", time.perf_counter() - began, "s")
    rounds = 4 if part.dry_run else 40
    warm_up = rounds // 4
    steps_s: dict[int, list[float]] = {}
    rounds_s: list[float] = []
    late_captures = steps = replayed = 0
    for i in range(rounds):
        if i == warm_up:
            steps_s.clear()
            part.report("captures", f"graphs captured by then, {name}", counters.captured - captured)
            late_captures, steps, replayed = counters.captured, engine.num_steps, counters.replayed
        for request in requests:
            request.advance(engine)
        began = time.perf_counter()
        grow(engine, requests, steps_s)
        if i >= warm_up:
            rounds_s.append(time.perf_counter() - began)
    for branches, seconds in sorted(steps_s.items()):
        what = f"step, {MODEL} drafter, {branches} branches of {name}"
        sizes = {"model": MODEL, "branches": branches, "context": context, "requests": num_requests}
        part.report("traced_step", what, 1e3 * median(seconds), "ms", steps=len(seconds), **sizes)
    part.report("traced_round", f"all steps of a round, {name}", 1e3 * median(rounds_s), "ms")
    hits = sum(request.hits for request in requests)
    part.report("trace_hits", f"hits of {num_requests * rounds} outcomes, {name}", hits)
    steps, replayed = engine.num_steps - steps, counters.replayed - replayed
    graphs = not part.dry_run
    part.report("replays", f"graphs replayed in {steps} steps, {name}", replayed)
    part.report(
        "late_captures", f"graphs captured after that, {name}", counters.captured - late_captures, graphs=graphs
    )
    part.report("eager_steps", f"steps that no graph was replayed for, {name}", max(0, steps - replayed), graphs=graphs)
    for request in requests:
        engine.close(request.name)
    if not hits:
        raise SystemExit("no outcome of the trace was hit: nothing was measured")


def grow(engine: DraftEngine, requests: list[Request], steps_s: dict[int, list[float]]) -> None:
    """Run all steps that there are to run; their seconds by the branches that they extended, 0 for prompts alone."""
    while engine.has_work:
        branches, before, began = int(engine.branches.alive.sum()), engine.num_steps, time.perf_counter()
        push = engine.speculate()
        if engine.num_steps > before:
            steps_s.setdefault(branches, []).append(time.perf_counter() - began)
        for request in requests:
            request.absorb(push)
