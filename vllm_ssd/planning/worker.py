"""The engines that measure a profile, each in its own process."""

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
"""Most drafts per branch, for which the draft model allocates logits."""


@dataclass(frozen=True, slots=True)
class Task:
    """An engine to measure.

    engine_args: vLLM's EngineArgs for the target or, with method "steps", for the drafter; environment: variables to
    set, or to remove if None; cpus: cores to run on, empty for all.
    """

    method: str
    engine_args: dict[str, Any]
    environment: dict[str, str | None] = field(default_factory=dict)
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decode:
    """Generate max_tokens for all prompts (texts or lists of token ids) in one batch."""

    prompts: Sequence[str | Sequence[int]]
    max_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Steps:
    """Grow trees num_drafts deep for `rows` requests with `branches` branches each."""

    rows: int
    branches: int
    num_drafts: int


def decode(
    engine: Any, prompts: Mapping[str, Any], max_tokens: int, temperature: float
) -> Iterator[tuple[float, list[Any]]]:
    """Generate for all prompts in one batch, yielding the seconds and outputs of each step.

    prompts: vLLM's prompts by request id
    """
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
        """The engine_args, cpus and environment of this engine's drafter; None without SSD."""
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
        """Seconds of every step in which all rows decoded, except the first two."""
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
        """Mean seconds of a step over all branches, for each tree but the first of STEP_TREES."""
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
            steps_s: dict[int, list[float]] = {}  # by number of branches before the step
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
        """Start the engine that `task` describes and return its `placement()`."""
        self._engine: Any = (DrafterEngine if task.method == "steps" else TargetEngine)(task.engine_args)
        gc.collect()
        gc.freeze()
        return self._engine.placement()

    def run(self, request: Decode | Steps) -> list[float]:
        """Run `request` and return the seconds of its steps."""
        return self._engine.run(request)
