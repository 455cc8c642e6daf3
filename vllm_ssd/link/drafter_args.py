"""`drafter_args`: vLLM's engine arguments for the draft model, and which of them the user may not set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vllm_ssd.config import SSDConfig

BESIDE = {
    name: name
    for name in (
        "model dtype quantization revision trust_remote_code enforce_eager max_model_len gpu_memory_utilization "
        "hf_overrides load_format download_dir tokenizer"
    ).split()
} | {"kv_cache_memory_bytes": "kv_cache_memory"}
"""Engine arguments with their own key in speculative_config, mapped to that key."""

ONE_PROCESS = "a drafter is one process on one device"
NO_SCHEDULER = "a drafter is scheduled by ssd"
OWN_PAGES = "ssd assigns a drafter's KV pages"
REFUSED = {
    "additional_config": "ssd carries its own keys there",
    "async_scheduling": NO_SCHEDULER,
    "block_size": OWN_PAGES,
    "disable_hybrid_kv_cache_manager": OWN_PAGES,
    "disable_log_stats": "a drafter's statistics are those of ssd",
    "distributed_executor_backend": ONE_PROCESS,
    "enable_lora": "adapters are the target's; the drafter drafts without them",
    "enable_prefix_caching": OWN_PAGES,
    "hf_token": "each user of the machine can read a drafter's command line; set HF_TOKEN in the environment",
    "kv_events_config": OWN_PAGES,
    "kv_offloading_size": OWN_PAGES,
    "kv_transfer_config": OWN_PAGES,
    "max_num_seqs": "a drafter serves as many requests as its target",
    "nnodes": ONE_PROCESS,
    "node_rank": ONE_PROCESS,
    "runner": "a draft model generates",
    "scheduler_cls": NO_SCHEDULER,
    "scheduling_policy": NO_SCHEDULER,
    "seed": "a drafter's random numbers must be independent of the target's",
    "spec_method": "a drafter does not speculate itself",
    "spec_model": "a drafter does not speculate itself",
    "spec_tokens": "a drafter does not speculate itself",
    "speculative_config": "a drafter does not speculate itself",
}
"""Engine arguments that ssd sets itself or that make no sense for a drafter, with the reason."""
PARALLEL = ("data_parallel_", "tensor_parallel_", "pipeline_parallel_", "prefill_context_", "decode_context_")

POSITIONS = frozenset(
    "rope_parameters rope_scaling rope_theta max_position_embeddings original_max_position_embeddings".split()
)
"""Keys of a Hugging Face config that determine the context length."""
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json tokenizer.model vocab.json vocab.txt spiece.model tekken.json".split()
)


def check_names(drafter_args: Mapping[str, Any], known: Collection[str] | None) -> None:
    """Raise ValueError for an unknown engine argument and for one that the user may not set.

    known: names of vLLM's engine arguments; None skips that check, for callers that do not import vLLM
    """
    for name in drafter_args:
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "valid names are those of vLLM's EngineArgs"
            raise ValueError(f"ssd: unknown key {name!r} in drafter_args; {hint}")
        if name in BESIDE:
            raise ValueError(f"ssd: {name} is not allowed in drafter_args: give {BESIDE[name]} in speculative_config")
        reason = ONE_PROCESS if name.startswith(PARALLEL) else REFUSED.get(name)
        if reason:
            raise ValueError(f"ssd: {name} is not allowed in drafter_args: {reason}")


def engine_arguments(config: SSDConfig) -> dict[str, Any]:
    """vLLM's engine arguments for the draft model that do not depend on its placement; None means vLLM's default."""
    return {
        "model": config.model,
        "tokenizer": config.tokenizer,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "hf_overrides": config.hf_overrides,
        "load_format": config.load_format,
        "download_dir": config.download_dir,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "enforce_eager": config.enforce_eager,
        **(config.drafter_args or {}),
    }


def has_no_tokenizer(model: str) -> bool:
    """Whether `model` is a local folder without tokenizer files."""
    return os.path.isdir(model) and not any(os.path.exists(os.path.join(model, name)) for name in TOKENIZER_FILES)


def overridden_positions(hf_overrides: Any) -> str:
    """Names of the settings in the target's `hf_overrides` that affect its context length; "" if none."""
    if not isinstance(hf_overrides, Mapping):
        return "a function" if hf_overrides is not None else ""
    nested = [value for value in hf_overrides.values() if isinstance(value, Mapping)]
    names = [name for settings in (hf_overrides, *nested) for name in settings if name in POSITIONS]
    return ", ".join(dict.fromkeys(names))


def inherited_scaling(
    hf_overrides: Any, positions_of_drafter: Callable[[], tuple[Mapping[str, Any], int]]
) -> dict[str, Any] | None:
    """The draft model's `hf_overrides` that apply the target's rope scaling to it; None if it may not fit.

    It fits a draft model without rope scaling whose context length is the target's `original_max_position_embeddings`.
    The draft model keeps its own rope_theta. positions_of_drafter: returns its `rope_parameters` and
    `max_position_embeddings`; called only if needed.
    """
    if not isinstance(hf_overrides, Mapping):
        return None
    given = {name: hf_overrides[name] for name in POSITIONS & hf_overrides.keys()}
    names = given.keys() - {"max_position_embeddings"}
    scaling = given[next(iter(names))] if len(names) == 1 else None
    if not isinstance(scaling, Mapping) or "original_max_position_embeddings" not in scaling:
        return None
    rope, max_positions = positions_of_drafter()
    by_layers = any(isinstance(value, Mapping) for value in rope.values())
    if by_layers or rope.get("rope_type", "default") != "default":
        return None
    if scaling["original_max_position_embeddings"] != max_positions:
        return None
    own = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return given | {name: {**scaling, **own} for name in names}
