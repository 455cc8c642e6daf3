"""LoRA adapters on the V2 runner: whose rows of logits are whose.

vLLM 0.32 and 0.33 name an adapter for each request there, as if it had one row of logits, but with drafts it has one
more for each (`LoraState.make_lora_inputs`). The CPU's operations raise over that; on a GPU an adapter of the output
layer would be applied to rows of other requests. V1 names one for each row.
"""

from __future__ import annotations

from typing import Any

from vllm_ssd.compat import patch

MAKE_INPUTS = "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs"


def repair_lora_rows() -> None:
    """Let states that `note_drafts` knows name an adapter for every row. Idempotent."""
    patch.wrap(MAKE_INPUTS, _knows_drafts, _make_lora_inputs, parameters=("req_ids",))


def note_drafts(runner: Any, scheduler_output: Any) -> None:
    """The step of vLLM's `SchedulerOutput` is next on the V2 runner `runner`."""
    runner.lora_state._ssd_drafts = scheduler_output.scheduled_spec_decode_tokens  # counted where there are adapters


def _knows_drafts(state: Any, *args: Any, **kwargs: Any) -> bool:
    return hasattr(state, "_ssd_drafts")


def _make_lora_inputs(original, state, req_ids, *args, **kwargs):
    of_rows, of_tokens, adapters = original(state, req_ids, *args, **kwargs)
    if len(of_rows) == len(req_ids):
        num_rows = [1 + len(state._ssd_drafts.get(request_id, ())) for request_id in req_ids]
        of_rows = tuple(adapter for adapter, number in zip(of_rows, num_rows) for _ in range(number))
    return of_rows, of_tokens, adapters
