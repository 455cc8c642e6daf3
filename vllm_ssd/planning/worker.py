"""The engines that a profile is measured with, each in a process of its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

DRAFTER_PROMPT_TOKENS = 64
STEP_TREES = 6
MAX_DRAFTS = 16
"""The most drafts of a branch: memory for the logits of so many is kept."""


@dataclass(frozen=True, slots=True)
class Task:
    """An engine to measure. engine_args: vLLM's EngineArgs, of the target or (method "steps") of the drafter.

    environment: variables to set, or with None to remove; cpus: cores to run on, empty for all.
    """

    method: str
    engine_args: dict[str, Any]
    environment: dict[str, str | None] = field(default_factory=dict)
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decode:
    """Generate max_tokens for all prompts (texts, or lists of token ids) at once."""

    prompts: Sequence[str | Sequence[int]]
    max_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Steps:
    """Grow trees of num_drafts for `rows` requests of `branches` branches each."""

    rows: int
    branches: int
    num_drafts: int


def decode(
    engine: Any, prompts: Mapping[str, Any], max_tokens: int, temperature: float
) -> Iterator[tuple[float, list[Any]]]:
    """Generate for all `prompts`, as vLLM takes them, by request id, at once: seconds and outputs of each step."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=temperature, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    started = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        yield now - started, outputs
        started = now


class TargetEngine:
    """vLLM's engine in this process."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(disable_log_stats=True, **engine_args))
        self._num_requests = 0

    def placement(self) -> dict[str, Any] | None:
        """engine_args, cpus and environment of this engine's drafter; None without one."""
        from vllm_ssd.compat.target.worker import visible_gpus
        from vllm_ssd.config import SSDConfig
        from vllm_ssd.link.placement import place_drafter

        vllm_config = self._engine.vllm_config
        ours = vllm_config.additional_config
        if not isinstance(ours, dict) or "ssd" not in ours:
            return None
        config = SSDConfig.from_json(ours["ssd"])
        options, environment, _ = place_drafter(config, vllm_config, visible_gpus())
        engine_args = {**options.engine_args, "tree_attention": options.tree_attention}
        return {"engine_args": engine_args, "cpus": tuple(options.cpus), "environment": environment}

    def run(self, request: Decode) -> list[float]:
        """Seconds of every step in which all rows decoded, without the first two."""
        prompts = {}
        for prompt in request.prompts:
            self._num_requests += 1
            text = prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
            prompts[str(self._num_requests)] = text
        steps = decode(self._engine, prompts, request.max_tokens, request.temperature)
        steps_s = [seconds for seconds, outputs in steps if len(outputs) == len(prompts)]
        return steps_s[2:]


class DrafterEngine:
    """A drafter in this process, without a target."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        from vllm_ssd.compat.drafter.draft_model import DraftModel

        self._model = DraftModel(num_drafts=MAX_DRAFTS, **engine_args)

    def placement(self) -> dict[str, Any]:
        """Whether the draft model draws all drafts of a branch in one step."""
        return {"parallel": self._model.mask_token_id is not None}

    def run(self, request: Steps) -> list[float]:
        """Mean seconds of a step over all branches, for each of STEP_TREES - 1 trees."""
        from vllm_ssd.drafter.server import build_engine
        from vllm_ssd.policy import FanOut

        engine = build_engine(
            self._model,
            FanOut(request.num_drafts, request.branches),
            num_speculative_tokens=request.num_drafts,
            max_num_seqs=request.rows,
            max_branches=request.branches,
            max_fan_out=request.branches,
            top_m=64,
            seed=0,
        )
        engine.warm_up()
        means = []
        for _ in range(STEP_TREES):
            for i in range(request.rows):
                prompt = np.arange(i, i + DRAFTER_PROMPT_TOKENS, dtype=np.int32) % self._model.vocab_size
                engine.open(str(i), 1, prompt, 0.0, request.num_drafts)
            steps_s: dict[int, list[float]] = {}  # by the branches that were there already
            started = time.perf_counter()
            while engine.has_work:
                alive, before = int(engine.branches.alive.sum()), engine.num_steps
                engine.speculate()
                if engine.num_steps > before:
                    now = time.perf_counter()
                    steps_s.setdefault(alive, []).append(now - started)
                    started = now
            means.append(fmean(steps_s[max(steps_s)]))
            for i in range(request.rows):
                engine.close(str(i))
        return means[1:]


class Worker:
    """The host of an engine that is measured, see `engine_host.serve`."""

    def start(self, task: Task) -> dict[str, Any] | None:
        """Start what `task` describes; returns where an SSD engine placed its drafter, or what a drafter's model is."""
        self._engine: Any = (DrafterEngine if task.method == "steps" else TargetEngine)(task.engine_args)
        gc.collect()
        gc.freeze()
        return self._engine.placement()

    def run(self, request: Decode | Steps) -> list[float]:
        """Seconds of the steps that `request` takes."""
        return self._engine.run(request)
