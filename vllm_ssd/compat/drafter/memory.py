"""Tell a user whose drafter has too little KV memory which key of ours to change, and to what."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

MIB = 1 << 20


def explained(error: ValueError, vllm_config: VllmConfig) -> ValueError:
    """What vLLM's start raised, in terms of our keys where it is about KV memory; else `error` itself.

    vLLM's own advice is about the target's keys, in GiB with two decimals.
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
    """A `kv_cache_memory` that holds twice the longest request: its tokens, and as many for its branches."""
    num_bytes = 2 * vllm_config.model_config.max_model_len * bytes_a_token(vllm_config)
    return f"{-(-num_bytes // MIB)}MiB"


def bytes_a_token(vllm_config: VllmConfig) -> int:
    """Bytes that one token's KV takes on this worker, all layers together."""
    model, parallel, cache_dtype = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.cache_config.cache_dtype,
    )
    item = torch.empty(0, dtype=model.dtype).element_size() if cache_dtype in ("auto", "bfloat16", "float16") else 1
    heads = 1 if model.use_mla else 2 * model.get_num_kv_heads(parallel)
    return model.get_num_layers(parallel) * heads * model.get_head_size() * item
