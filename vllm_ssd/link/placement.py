"""A drafter's placement: cores or GPU, memory and environment, and vLLM's engine arguments that follow from them.

Each data-parallel replica of the target has its own drafters. `vllm_ssd.link.gpus` chooses the GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ssd.config import REPLICAS_ENV, SSDConfig, parse_cpus
from vllm_ssd.link.drafter_args import engine_arguments
from vllm_ssd.link.gpus import Gpus, Replicas, drafter_gpu, named_gpus, replicas_here, target_gpus
from vllm_ssd.link.options import DrafterOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_KV_CACHE_BYTES = 512 << 20
"""Default KV memory of a drafter on the CPU."""


ON_CPU: dict[str, str | None] = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TRITON_INTERPRET": None,  # a target on the V2 runner may need it; the drafter would only be slower
    "VLLM_CPU_KVCACHE_SPACE": None,  # the target's; it would override kv_cache_memory_bytes
}
"""Changes to the environment of any drafter on the CPU; None removes a variable."""
NO_UTILIZATION = 0.01
"""gpu_memory_utilization if the bytes of the KV pages are given: vLLM then only checks that this share is free."""
MAX_SHARED_UTILIZATION = 1.0
"""Largest sum of gpu_memory_utilization of two processes that share a GPU."""


class Placement(NamedTuple):
    """A drafter's options, and changes to its environment, where None removes a variable.

    beside_target: whether it runs on this worker's own GPU
    """

    options: DrafterOptions
    environment: dict[str, str | None]
    beside_target: bool = False


def place_drafter(config: SSDConfig, vllm_config: VllmConfig, gpus: Gpus | None, drafter: int = 0) -> Placement:
    """Place this worker's drafter with index `drafter`; gpus: None if vLLM is built for the CPU.

    Raises ValueError, naming the key, if no GPU is free or the drafter would take memory that others use.
    """
    is_cpu = gpus is None
    if is_cpu and config.drafter_device not in (None, "cpu"):
        raise ValueError(
            f"ssd: drafter_device must be 'cpu' when the target runs on the CPU, got {config.drafter_device!r}"
        )
    if config.drafter_device == "cpu" and not is_cpu:
        raise ValueError("ssd: drafter_device 'cpu' needs a CPU build of vLLM; this one is built for a GPU")
    parallel, max_num_seqs = vllm_config.parallel_config, vllm_config.scheduler_config.max_num_seqs
    target_len = vllm_config.model_config.max_model_len
    engine_args = _engine_args(config, max_num_seqs) | {
        "max_model_len": min(config.max_model_len, target_len) if config.max_model_len else None,
        "target_max_model_len": target_len,
    }
    environment = _environment()
    cpus: list[int] = []
    beside_target = False
    if gpus is None:
        replica = parallel.data_parallel_rank_local or 0
        num_replicas = max(int(os.environ.get(REPLICAS_ENV, "1")), replica + 1)
        cpus = share(
            parse_cpus(config.drafter_cpus) if config.drafter_cpus else default_cpus(),
            replica * config.num_drafters + drafter,
            num_replicas * config.num_drafters,
        )
        engine_args["kv_cache_memory_bytes"] = config.kv_cache_memory or CPU_KV_CACHE_BYTES
        environment |= _on_cores(cpus)
    else:
        replicas = replicas_here(parallel, int(os.environ.get(REPLICAS_ENV, "1")))
        index = drafter_gpu(config.drafter_device, parallel, gpus, replicas, drafter, config.num_drafters)
        beside_target = index == gpus.current
        _check_memory(config, vllm_config, gpus, replicas, index)
        environment |= {
            "CUDA_VISIBLE_DEVICES": gpus.names[index],
            "HIP_VISIBLE_DEVICES": None,  # on ROCm the other name of the same variable
            "VLLM_ENABLE_STARTUP_PLAN": None,  # would size KV pages without the memory that our steps need
        }
        engine_args |= _gpu_memory(config)
        if config.drafter_cpus:
            cpus = share(
                parse_cpus(config.drafter_cpus),
                replicas.index * config.num_drafters + drafter,
                replicas.known * config.num_drafters,
            )
    options = _options(config, engine_args, max_num_seqs, cpus, is_cpu)
    return Placement(options, environment, beside_target)


def place_standalone(config: SSDConfig, max_num_seqs: int, on_cpu: bool) -> Placement:
    """Place a drafter that targets connect to: on the first visible GPU, or on `drafter_cpus`.

    Raises ValueError for `drafter_device`, which refers to a target's devices.
    """
    if config.drafter_device is not None:
        raise ValueError("ssd: drafter_device is for drafters that a server starts; set CUDA_VISIBLE_DEVICES here")
    engine_args, environment = _engine_args(config, max_num_seqs), _environment()
    engine_args["max_model_len"] = config.max_model_len
    cpus = list(parse_cpus(config.drafter_cpus)) if config.drafter_cpus else []
    if on_cpu:
        engine_args["kv_cache_memory_bytes"] = config.kv_cache_memory or CPU_KV_CACHE_BYTES
        environment |= _on_cores(cpus) if cpus else ON_CPU
    else:
        engine_args |= _gpu_memory(config)
    return Placement(_options(config, engine_args, max_num_seqs, cpus, on_cpu), environment)


def target_limits(config: SSDConfig, max_num_seqs: int) -> DrafterOptions:
    """The sizes that a target accepts from a drafter that it does not start."""
    return _options(config, {}, max_num_seqs, [], on_cpu=True)


def _engine_args(config: SSDConfig, max_num_seqs: int) -> dict[str, Any]:
    """vLLM's engine arguments for the draft model, except context length and memory."""
    return {
        **engine_arguments(config),
        "max_num_seqs": max_num_seqs,
        "num_branches": max_num_seqs * config.max_branches,
        "seed": 0,
    }


def _options(
    config: SSDConfig, engine_args: dict[str, Any], max_num_seqs: int, cpus: list[int], on_cpu: bool
) -> DrafterOptions:
    return DrafterOptions(
        engine_args={key: value for key, value in engine_args.items() if value is not None},
        num_speculative_tokens=config.num_speculative_tokens,
        fan_out=list(config.fan_out) if isinstance(config.fan_out, tuple) else config.fan_out,
        branch_budget=config.branch_budget,
        max_num_seqs=max_num_seqs,
        max_branches=config.max_branches,
        top_m=config.top_m,
        saguaro_c=config.saguaro_c,
        cpus=cpus,
        parent_pid=os.getpid(),
        tree_attention=config.tree_attention and not on_cpu,
        graphs=not on_cpu,
    )


def _environment() -> dict[str, str | None]:
    """Changes to the environment of any drafter."""
    environment: dict[str, str | None] = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # torch.distributed listens even with a world size of 1
    return environment


def _on_cores(cpus: Sequence[int]) -> dict[str, str | None]:
    """Changes to the environment of a drafter on these cores."""
    places = ",".join(map(str, cpus))
    return ON_CPU | {
        "OMP_NUM_THREADS": str(len(cpus)),
        "OMP_PLACES": f"{{{places}}}",
        "OMP_PROC_BIND": "true",
    }


def _gpu_memory(config: SSDConfig) -> dict[str, Any]:
    """vLLM's engine arguments for a drafter's memory on a GPU; None keeps vLLM's default."""
    return {
        "kv_cache_memory_bytes": config.kv_cache_memory,
        "gpu_memory_utilization": config.gpu_memory_utilization or (NO_UTILIZATION if config.kv_cache_memory else None),
    }


def _check_memory(config: SSDConfig, vllm_config: VllmConfig, gpus: Gpus, replicas: Replicas, index: int) -> None:
    """Raise ValueError if the drafter shares GPU `index` and its share of the memory is not specified."""
    where, chosen = f"cuda:{index}", named_gpus(config.drafter_device)
    drafters = replicas.known * config.num_drafters
    if chosen and drafters > len(chosen) and not config.kv_cache_memory:
        raise ValueError(
            f"ssd: several drafters share {where} and cannot tell how much of its memory each may use: set "
            f'kv_cache_memory, or name a GPU for each of the {drafters}, as in drafter_device "cuda:2,3"'
        )
    if index not in target_gpus(vllm_config.parallel_config, gpus, replicas) or config.kv_cache_memory:
        return
    if index != gpus.current or config.gpu_memory_utilization is None:
        raise ValueError(f"ssd: the drafter shares {where} with the target: set kv_cache_memory, the bytes it may use")
    total = config.gpu_memory_utilization + vllm_config.cache_config.gpu_memory_utilization
    if total > MAX_SHARED_UTILIZATION:
        raise ValueError(
            f"ssd: target and drafter share {where} and ask for {total:.0%} of it: lower --gpu-memory-utilization "
            f"({vllm_config.cache_config.gpu_memory_utilization:g}), or gpu_memory_utilization in speculative_config "
            f"({config.gpu_memory_utilization:g})"
        )


def share(cpus: Sequence[int], drafter: int, num_drafters: int) -> list[int]:
    """One drafter's part of the cores for all drafters; all of them if there are fewer cores than drafters."""
    return list(cpus[drafter::num_drafters] if len(cpus) >= num_drafters else cpus)


def default_cpus() -> list[int]:
    """Cores for drafters: those the server may use and to which vLLM binds no worker threads.

    The workers' cores are in OMP_PLACES, or in VLLM_CPU_OMP_THREADS_BIND if the user sets it. If neither leaves any
    core, or neither is set, this is the last core.
    """
    allowed, bound = sorted(_allowed_cpus()), bound_cpus()
    return [core for core in allowed if core not in bound] if bound and not bound >= set(allowed) else allowed[-1:]


def bound_cpus() -> set[int]:
    """Cores to which vLLM binds its workers' threads, according to the environment."""
    bound = {int(core) for core in re.findall(r"\d+", os.environ.get("OMP_PLACES", ""))}
    for part in os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "").split("|"):
        with contextlib.suppress(ValueError):  # "auto", "nobind" or nothing
            bound |= set(parse_cpus(part))
    return bound


def _allowed_cpus() -> set[int]:
    """Cores of this worker and its parent process, since vLLM narrows the worker's own affinity."""
    own = os.sched_getaffinity(0)
    try:
        return own | os.sched_getaffinity(os.getppid())
    except OSError:
        return own


def run_on(cpus: Sequence[int]) -> list[int]:
    """Pin only this thread, and so every child process that it starts later, to `cpus`; empty changes nothing.

    Returns the cores of `cpus` that it may not run on.
    """
    if not cpus:
        return []
    try:
        os.sched_setaffinity(0, cpus)
        return sorted(set(cpus) - os.sched_getaffinity(0))
    except OSError:
        return sorted(cpus)
