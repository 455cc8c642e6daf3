"""The drafter's memory for logits and KV pages, and error messages if it does not suffice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

MIB = 1 << 20
MAX_LOGIT_BYTES = 1 << 30
"""Most memory for the logits of one step; steps over more branches are split."""


def bytes_a_row(vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes for the logits of one token: two copies in the model's dtype and one in float32."""
    return vocab_size * (2 * dtype.itemsize + 4)


def max_rows(vocab_size: int, dtype: torch.dtype) -> int:
    """Most branches in one step."""
    return max(MAX_LOGIT_BYTES // bytes_a_row(vocab_size, dtype), 1)


def executor_with_reserve(num_bytes: int) -> type[UniProcExecutor]:
    """vLLM's executor, with `num_bytes` subtracted from the memory available for KV pages.

    vLLM's own profiling run assumes one logits row per request, not one per branch.
    """
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    class Executor(UniProcExecutor):
        def determine_available_memory(self) -> list[int]:
            available = super().determine_available_memory()
            is_given = self.vllm_config.cache_config.kv_cache_memory_bytes
            return available if is_given else [size - num_bytes for size in available]

    return Executor


def explained(error: ValueError, vllm_config: VllmConfig) -> ValueError:
    """Translate an error of vLLM's startup about KV memory into advice about our keys; returns others unchanged.

    vLLM's own message names the target's options, in GiB with two decimals.
    """
    text = str(error)
    if "memory" not in text or not ("KV cache" in text or "cache blocks" in text):
        return error
    available = vllm_config.cache_config.kv_cache_memory_bytes
    if not available:
        return ValueError(
            "no GPU memory is left for the drafter's KV pages: raise gpu_memory_utilization in speculative_config, or "
            f"set kv_cache_memory there to at least {enough_memory(vllm_config)} ({text})"
        )
    max_model_len = vllm_config.model_config.max_model_len
    return ValueError(
        f"kv_cache_memory = {available / MIB:.4g}MiB cannot hold a request of max_model_len = {max_model_len} tokens: "
        f'set kv_cache_memory in speculative_config to "{enough_memory(vllm_config)}" or more, or max_model_len to '
        f"{available // 2 // bytes_a_token(vllm_config)} or less"
    )


def enough_memory(vllm_config: VllmConfig) -> str:
    """A `kv_cache_memory` for the longest request, with as many tokens again for its branches."""
    num_bytes = 2 * vllm_config.model_config.max_model_len * bytes_a_token(vllm_config)
    return f"{-(-num_bytes // MIB)}MiB"


def bytes_a_token(vllm_config: VllmConfig) -> int:
    """Bytes of one token's KV on this worker, over all layers."""
    model, parallel, cache_dtype = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.cache_config.cache_dtype,
    )
    item = torch.empty(0, dtype=model.dtype).element_size() if cache_dtype in ("auto", "bfloat16", "float16") else 1
    heads = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    return model.get_num_layers(parallel) * heads * model.get_head_size() * item
