"""`python record_launches.py`: what a drafter's engine would launch on a GPU, recorded without one; JSON on stdout.

Triton's specialisation keys are computed as for CUDA, and nothing is compiled or run: a stand-in for `sample` names the
same tokens always, and the stand-in model has one layer of tree attention. Host and device pages count as they do.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import triton
from triton import knobs
from triton.runtime.jit import compute_cache_key

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from compile_all import NoLaunch

from vllm_ssd.compat.drafter.graphs import Replay
from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch
from vllm_ssd.drafter import device_steps, self_check
from vllm_ssd.drafter.engine import DraftEngine
from vllm_ssd.drafter.pages import device
from vllm_ssd.drafter.server import build_engine
from vllm_ssd.kernels import copy_pages, tree_attention
from vllm_ssd.link.protocol import unpack_ids
from vllm_ssd.policy import FanOut

K = 5
BRANCHES = 24
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 64  # Llama-3.2-1B


class StandIn:
    """A model of one layer, on the CPU, that says the same after all tokens."""

    tree_attention = True
    mask_token_id = None
    vocab_size = 128
    page_size = 32
    num_pages = 1 << 16
    weight_bytes = kv_bytes = logit_bytes = 0
    dtype = torch.bfloat16
    device = torch.device("cpu")

    def __init__(self, max_model_len: int = 33_000) -> None:
        self.max_model_len = max_model_len
        cache = torch.zeros(4, KV_HEADS, self.page_size, 2 * HEAD_SIZE, dtype=self.dtype)
        self.keys, self.values = cache.transpose(1, 2).chunk(2, dim=-1)

    def warm_up(self, sizes: Sequence[int]) -> int:
        return 0

    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        assert isinstance(batch, TreeBatch)
        qkv = torch.zeros(len(batch.token_ids), (HEADS + 2 * KV_HEADS) * HEAD_SIZE, dtype=self.dtype)
        tree_attention(
            qkv[:, : HEADS * HEAD_SIZE].view(-1, HEADS, HEAD_SIZE),
            self.keys,
            self.values,
            batch.page_tables,
            batch.query_start_loc,
            batch.shared_lens,
            batch.own_pages,
            batch.own_lens,
            scale=HEAD_SIZE**-0.5,
            max_shared_len=batch.max_shared_len,
            max_rows=batch.max_rows,
        )
        n = len(batch.token_ids if batch.logit_indices is None else batch.logit_indices)
        return torch.zeros(n, self.vocab_size, dtype=self.dtype)

    def copy_pages(self, sources: list[int], destinations: list[int]) -> None:
        raise AssertionError("these are pages of the host")

    def copy_slots(self, sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor) -> None:
        copy_pages([self.keys, self.values] * 16, sources, destinations, num_slots)


class Recorder:
    """Kernels launched, captures and replays since the last `reset`, and every specialisation key so far."""

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()
        self.reset()

    def reset(self) -> None:
        self.programs, self.launches = Counter[str](), Counter[str]()
        self.captures = self.replays = 0

    def install(self) -> None:
        """Record in place of compiling and launching."""
        triton.runtime.driver.set_active(NoLaunch(90))
        recorder = self

        def run(kernel, *args, grid, warmup, **kwargs):
            options = {"debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
            _, key_cache, _, _, binder = kernel.device_caches[0]
            _, specialization, parsed = binder(*args, **kwargs | options)
            recorder.keys.add((kernel.__name__, compute_cache_key(key_cache, specialization, parsed)))
            recorder.programs[kernel.__name__] += math.prod(grid)
            recorder.launches[kernel.__name__] += 1
            if kernel.__name__ == "_draw_kernel":
                token_ids, q_token_ids, q_probs, draft_probs, candidate_ids, candidate_probs = args[7:13]
                token_ids.zero_()
                draft_probs.fill_(0.5)
                for ids, probs in ((q_token_ids, q_probs), (candidate_ids, candidate_probs)):
                    ids.copy_(torch.arange(ids.shape[1]))
                    probs.fill_(1 / probs.shape[1])

        triton.JITFunction.run = run
        for name in ("commit", "copy_pages", "expand", "reserve", "sample", "tree_attention"):
            sys.modules[f"vllm_ssd.kernels.{name}"].use_triton = lambda tensor: True
        sys.modules["vllm_ssd.kernels.tree_attention"]._num_processors = lambda device: 132
        for name in ("keep", "adopt", "drop"):  # of pages that no kernel has filled in
            setattr(device, name, lambda *arguments: None)
        device_steps.graphs_on = lambda device: self

    def capture(self, step: Callable[[], None]) -> Replay:
        """As `Graphs.capture`."""
        self.captures += 1
        step()

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def engine_of(model: StandIn, max_num_seqs: int) -> DraftEngine:
    return build_engine(
        model,
        FanOut(K, None, BRANCHES),
        num_speculative_tokens=K,
        max_num_seqs=max_num_seqs,
        max_branches=48,
        max_fan_out=16,
        top_m=64,
        seed=0,
    )


class Serving:
    """Requests that join, hit, miss and leave; outcomes may come between the steps of a tree."""

    def __init__(self, engine: DraftEngine, seed: int = 0) -> None:
        self.engine, self.rng = engine, random.Random(seed)
        self.lengths: dict[str, int] = {}
        self.drafts: dict[str, list[int]] = {}
        self.blocks: dict[str, dict[tuple[int, int], list[int]]] = {}
        self.joined = 0

    def open(self, length: int) -> str:
        """A prompt of its own; sampled, every other one."""
        name, self.joined = f"r{self.joined}", self.joined + 1
        prompt = np.full(length, self.joined % StandIn.vocab_size, np.int32)
        prompt[0] = self.rng.randrange(StandIn.vocab_size)
        self.lengths[name], self.drafts[name], self.blocks[name] = length, [], {}
        self.engine.open(name, 0, prompt, float(self.joined % 2), K)
        return name

    def close(self, name: str) -> None:
        self.engine.close(name)
        del self.lengths[name]

    def grow(self, most_steps: int = 1000) -> None:
        while self.engine.has_work and most_steps:
            push, most_steps = self.engine.speculate(), most_steps - 1
            for block in push.blocks if push else ():
                for i, outcome in enumerate(unpack_ids(block.outcomes).reshape(-1, 2).tolist()):
                    if block.request_id in self.lengths:
                        self.blocks[block.request_id].setdefault(tuple(outcome), []).extend(block.drafts(i))
            assert not (push and push.evicted), "the pages are enough for all"

    def advance(self, name: str, hit: bool, named: int = K) -> None:
        """The outcome that is predicted best, or one that nobody predicts, after which n-gram drafts are verified."""
        if hit and self.blocks[name]:
            (k, bonus), drafts = max(self.blocks[name].items())
            emitted = [*self.drafts[name][:k], bonus]
        else:
            emitted, drafts = [StandIn.vocab_size - 1], [StandIn.vocab_size - 2] * named
        self.lengths[name] += len(emitted)
        self.drafts[name], self.blocks[name] = drafts, {}
        self.engine.advance(name, 0, self.lengths[name], emitted, drafts, num_drafts=K)


def steps_of_rounds(recorder: Recorder, engine: DraftEngine, context: int) -> dict[str, list[int]]:
    """Replayed and eager steps of rounds of one request that hit, and of rounds that miss."""
    serving = Serving(engine)
    name = serving.open(context)
    serving.grow()
    steps = {"hit": [], "miss": [], "miss with drafts": []}
    for kind in ["hit", "miss", "hit", "hit", "miss with drafts", "hit", "miss", "miss"]:
        recorder.reset()
        eager = engine._stepper.num_eager_steps
        serving.advance(name, kind == "hit", K if kind.endswith("drafts") else 0)
        serving.grow()
        steps[kind].append(recorder.replays)
        assert engine._stepper.num_eager_steps == eager, f"a {kind} was not replayed"
    serving.close(name)
    return steps


def serve(engine: DraftEngine, num_rounds: int, contexts: Sequence[int], most_requests: int, seed: int) -> int:
    """Steps beyond those of prompts that were not replayed, over rounds of up to so many requests."""
    serving = Serving(engine, seed)
    stepper, rng, num_branches = engine._stepper, serving.rng, engine._budget.branches
    engine._budget.branches = lambda *arguments: rng.choice([4, 7, 16, 24, 48])
    eager = 0
    for i in range(num_rounds):
        joins = len(serving.lengths) < min(most_requests, 1 + i // 2)
        if joins:
            serving.open(rng.choice(contexts))
            while engine._unfinished:
                serving.grow(1)
        before = stepper.num_eager_steps
        serving.grow(rng.choice([1, 3, 1000]))
        for name in list(serving.lengths):
            if rng.random() < 0.02:
                serving.close(name)
            elif rng.random() < 0.8:
                serving.advance(name, rng.random() < 0.7, rng.randint(0, K))
        serving.grow(rng.choice([1, 1000]))
        eager += stepper.num_eager_steps - before
    for name in list(serving.lengths):
        serving.close(name)
    engine._budget.branches = num_branches
    return eager


def programs_of_a_round(recorder: Recorder, max_num_seqs: int) -> dict[str, dict[str, int]]:
    """Launches and programs of one request's hit and miss, in an engine of so many slots."""
    engine = engine_of(StandIn(), max_num_seqs)
    serving = Serving(engine)
    name = serving.open(1000)
    serving.grow()
    programs = {}
    for kind in ("hit", "miss"):
        recorder.reset()
        serving.advance(name, kind == "hit", 0)
        serving.grow()
        programs[kind] = dict(recorder.programs) | {"branches": len(engine.sequences[name].rows)}
    return programs


def main() -> None:
    recorder = Recorder()
    recorder.install()
    model = StandIn()
    engine = engine_of(model, 17)
    self_check._error = lambda *arguments: 0.0  # there is nothing to compare
    self_check.check_trees(engine_of(model, 17), model, K)
    num_buckets = engine.warm_up()
    warm = set(recorder.keys)
    recorder.reset()
    late, eager = {}, 0
    for requests, contexts in ((1, [2, 64, 2049, 32_000]), (2, [3, 9, 8000]), (16, [65, 700, 4096]), (17, [64, 1000])):
        eager += serve(engine, 12, contexts, requests, seed=requests)
        late[requests] = sorted(name for name, _ in recorder.keys - warm)
    print(
        json.dumps(
            {
                "buckets": num_buckets,
                "variants": Counter(name for name, _ in warm),
                "compiled while serving": late,
                "captured while serving": recorder.captures,
                "replayed while serving": recorder.replays,
                "eager while serving": eager,
                "steps": {context: steps_of_rounds(recorder, engine, context) for context in (64, 5000)},
                "programs": {slots: programs_of_a_round(recorder, slots) for slots in (4, 1024)},
            }
        )
    )


if __name__ == "__main__":
    main()
