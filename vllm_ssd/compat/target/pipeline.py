"""Fixes for speculation under pipeline parallelism on vLLM's V1 runner.

vLLM has three bugs there, with any speculative method (observed in 0.32, found by reading in 0.30). vLLM imports a
worker extension in every worker; this one fixes two of them on import:

- `GPUModelRunner` reads `self.drafter` on every rank once it lays out or uses KV, but only the last rank sets it. The
  attribute must not exist earlier, because `load_model` is then called on it.
- Early ranks get a round's bonus token, but not its accepted drafts. So a request that was preempted or skipped for a
  step would continue from wrong tokens. The scheduler sends all tokens of such a request.

The third is in the scheduler: see `run_one_batch_at_a_time`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ssd.compat import patch
from vllm_ssd.compat.target.runner import has_ssd


class WorkerExtension:
    """An empty mixin for vLLM's worker class; importing this module applies the fixes."""


def install() -> None:
    """Fix the V1 runner for targets with ssd; idempotent."""
    runner = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
    patch.wrap(f"{runner}.initialize_kv_cache", _has_ssd, _name_missing_proposer)
    patch.wrap(f"{runner}._update_states", _has_ssd, _learn_accepted_drafts, parameters=("scheduler_output",))


def _has_ssd(runner: Any, *args: Any, **kwargs: Any) -> bool:
    return has_ssd(getattr(runner, "vllm_config", None))


def _name_missing_proposer(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    if not hasattr(runner, "drafter"):
        runner.drafter = None
    return original(runner, *args, **kwargs)


def _learn_accepted_drafts(original: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    if runner.drafter is None:
        for request_id, token_ids in scheduler_output.scheduled_cached_reqs.all_token_ids.items():
            state = runner.requests[request_id]
            state.output_token_ids = token_ids[state.num_prompt_tokens :]
    return original(runner, scheduler_output)


install()
