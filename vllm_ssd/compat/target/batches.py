"""Limit the number of batches that vLLM's engine has in flight."""

from __future__ import annotations

from typing import Any

from vllm_ssd.compat import patch
from vllm_ssd.compat.target.runner import has_ssd

MAX_CONCURRENT_BATCHES = "vllm.config.vllm:VllmConfig.max_concurrent_batches"


def run_one_batch_at_a_time() -> None:
    """Prevent an engine with ssd on the V1 runner from overlapping batches under pipeline parallelism.

    There vLLM (0.29 to 0.33) asks for drafts after each batch it starts, but gets those of the batch in flight. Its
    scheduler then schedules these requests again before their bonus tokens are known. Idempotent; needed in every
    process.
    """
    patch.wrap(MAX_CONCURRENT_BATCHES, _is_ssd_on_v1, lambda original, config: 1)


def _is_ssd_on_v1(config: Any) -> bool:
    method = getattr(getattr(config, "speculative_config", None), "method", None)
    return method == "custom_class" and has_ssd(config)
