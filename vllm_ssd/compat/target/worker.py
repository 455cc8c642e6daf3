"""Hooks into vLLM's worker: its visible GPUs, the memory of a drafter on the same GPU, and `/sleep`.

vLLM sizes the target's KV pages by the GPU memory used since a snapshot. That snapshot is older than our drafter, so
vLLM would count the drafter's memory as the target's.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_ssd.compat import patch
from vllm_ssd.link.gpus import Gpus, visible_names

WORKER = "vllm.v1.worker.gpu_worker:Worker"
_hooks: dict[int, WorkerHooks] = {}
"""By the id of the `VllmConfig`, which is not hashable, and could not be pickled with our hooks as an attribute."""


@dataclass(slots=True)
class WorkerHooks:
    """Hooks of one `VllmConfig`'s worker for its drafter.

    drafter_bytes: memory on this worker's GPU that the drafter has taken since vLLM's snapshot
    on_sleep, on_wake: called before the target releases its memory, and after it has reclaimed it
    """

    drafter_bytes: int
    on_sleep: Callable[[], None]
    on_wake: Callable[[], None]


def visible_gpus() -> Gpus | None:
    """The GPUs that this worker sees, None if vLLM is built for the CPU; does not create a CUDA context."""
    if current_platform.is_cpu():
        return None
    return Gpus(
        visible_names(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.accelerator.device_count()),
        torch.accelerator.current_device_index(),
        current_platform.device_control_id_to_physical_device_id,
    )


def attach(vllm_config: Any, hooks: WorkerHooks) -> None:
    """Attach `hooks` to the worker that was started with `vllm_config`; others behave as before."""
    _hooks[id(vllm_config)] = hooks
    weakref.finalize(vllm_config, _hooks.pop, id(vllm_config), None)
    install()


def install() -> None:
    """Wrap vLLM's worker for workers with hooks; idempotent."""
    with patch.all_or_nothing():
        patch.wrap(f"{WORKER}.determine_available_memory", _has_hooks, _determine_available_memory)
        patch.wrap(f"{WORKER}.sleep", _has_hooks, _sleep, parameters=("level",))
        patch.wrap(f"{WORKER}.wake_up", _has_hooks, _wake_up, parameters=("tags",))


def _has_hooks(worker: Any, *args: Any, **kwargs: Any) -> bool:
    return id(getattr(worker, "vllm_config", None)) in _hooks


def _hooks_of(worker: Any) -> WorkerHooks:
    return _hooks[id(worker.vllm_config)]


def _determine_available_memory(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Correct vLLM's snapshot as if the drafter had been loaded before it."""
    hooks = _hooks_of(worker)
    taken, hooks.drafter_bytes = hooks.drafter_bytes, 0  # the snapshot is corrected once
    if taken:
        snapshot = worker.init_snapshot
        snapshot.free_memory -= taken
        snapshot.cuda_memory += taken
        snapshot.non_torch_memory += taken
    return original(worker, *args, **kwargs)


def _sleep(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    _hooks_of(worker).on_sleep()
    return original(worker, *args, **kwargs)


def _wake_up(original: Callable[..., Any], worker: Any, tags: list[str] | None = None) -> None:
    original(worker, tags)
    if tags is None or "kv_cache" in tags:  # until then, somebody else may still be using the memory
        _hooks_of(worker).on_wake()
