"""Fix the mapping of LoRA adapters to logits rows on the V2 runner.

vLLM 0.32 and 0.33 assign adapters per request there, as if each had a single row of logits, but a request has one more
row per draft (`LoraState.make_lora_inputs`). The CPU's operations raise in that case; on a GPU an adapter of the output
layer would be applied to rows of other requests. The V1 runner assigns adapters per row.
"""

from __future__ import annotations

from typing import Any

from vllm_ssd.compat import patch

MAKE_INPUTS = "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs"


def repair_lora_rows() -> None:
    """Assign an adapter to every row of LoRA states that `note_drafts` has been called for; idempotent."""
    patch.wrap(MAKE_INPUTS, _knows_drafts, _make_lora_inputs, parameters=("req_ids",))


def note_drafts(runner: Any, scheduler_output: Any) -> None:
    """Remember the drafts of the V2 runner's next step, before it runs."""
    runner.lora_state._ssd_drafts = scheduler_output.scheduled_spec_decode_tokens  # counted only if there are adapters


def _knows_drafts(state: Any, *args: Any, **kwargs: Any) -> bool:
    return hasattr(state, "_ssd_drafts")


def _make_lora_inputs(original, state, req_ids, *args, **kwargs):
    of_rows, of_tokens, adapters = original(state, req_ids, *args, **kwargs)
    if len(of_rows) == len(req_ids):
        num_rows = [1 + len(state._ssd_drafts.get(request_id, ())) for request_id in req_ids]
        of_rows = tuple(adapter for adapter, number in zip(of_rows, num_rows) for _ in range(number))
    return of_rows, of_tokens, adapters
