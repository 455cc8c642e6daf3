"""Where the drafter runs and what vLLM is told there: cores or GPU, memory, environment.

Each data-parallel replica of the target has a drafter of its own. `vllm_ssd.link.gpus` chooses the GPU.
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
"""KV memory of a drafter on the CPU when the user names none."""


ON_CPU: dict[str, str | None] = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TRITON_INTERPRET": None,  # a target on the V2 runner may need it; here it would only be slow
    "VLLM_CPU_KVCACHE_SPACE": None,  # the target's; it would override kv_cache_memory_bytes
}
"""What changes in the environment of a drafter on the CPU, on whatever cores."""
NO_UTILIZATION = 0.01
"""Share of a GPU that vLLM wants to find free, and else does not use, where the bytes of the KV pages are given."""
MAX_SHARED_UTILIZATION = 1.0
"""What two processes on one GPU may ask of it together."""


class Placement(NamedTuple):
    """A drafter's start options, and what its environment changes; there, None removes a variable.

    beside_target: whether it runs on this worker's own GPU
    """

    options: DrafterOptions
    environment: dict[str, str | None]
    beside_target: bool = False


def place_drafter(config: SSDConfig, vllm_config: VllmConfig, gpus: Gpus | None, drafter: int = 0) -> Placement:
    """Where this worker's drafter of index `drafter` runs, and with what; gpus: None where vLLM is built for the CPU.

    Raises ValueError, naming the key, where the GPU or the memory that it would get is another's.
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
            "VLLM_ENABLE_STARTUP_PLAN": None,  # sizes KV pages without what our steps need
        }
        engine_args |= _gpu_memory(config)
        if config.drafter_cpus:
            cpus = share(
                parse_cpus(config.drafter_cpus),
                replicas.index * config.num_drafters + drafter,
                replicas.known * config.num_drafters,
            )
    options = _options(config, engine_args, max_num_seqs, cpus, config.tree_attention and not is_cpu)
    return Placement(options, environment, beside_target)


def place_standalone(config: SSDConfig, max_num_seqs: int, on_cpu: bool) -> Placement:
    """What a drafter that targets connect to is told: it takes the first visible GPU, or `drafter_cpus`.

    Raises ValueError for keys that say where among a target's devices a drafter goes.
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
    return Placement(
        _options(config, engine_args, max_num_seqs, cpus, config.tree_attention and not on_cpu), environment
    )


def target_limits(config: SSDConfig, max_num_seqs: int) -> DrafterOptions:
    """The sizes of what a target takes from a drafter that it does not start."""
    return _options(config, {}, max_num_seqs, [], False)


def _engine_args(config: SSDConfig, max_num_seqs: int) -> dict[str, Any]:
    """vLLM's engine arguments for the draft model, but for its length and memory."""
    return {
        **engine_arguments(config),
        "max_num_seqs": max_num_seqs,
        "num_branches": max_num_seqs * config.max_branches,
        "seed": 0,
    }


def _options(
    config: SSDConfig, engine_args: dict[str, Any], max_num_seqs: int, cpus: list[int], tree_attention: bool
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
        tree_attention=tree_attention,
    )


def _environment() -> dict[str, str | None]:
    """What changes in any drafter's environment."""
    environment: dict[str, str | None] = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # torch.distributed listens even in a world of one
    return environment


def _on_cores(cpus: Sequence[int]) -> dict[str, str | None]:
    """What changes in the environment of a drafter on these cores."""
    places = ",".join(map(str, cpus))
    return ON_CPU | {
        "OMP_NUM_THREADS": str(len(cpus)),
        "OMP_PLACES": f"{{{places}}}",
        "OMP_PROC_BIND": "true",
    }


def _gpu_memory(config: SSDConfig) -> dict[str, Any]:
    """vLLM's engine arguments for the memory of a drafter on a GPU; None where vLLM's default stays."""
    return {
        "kv_cache_memory_bytes": config.kv_cache_memory,
        "gpu_memory_utilization": config.gpu_memory_utilization or (NO_UTILIZATION if config.kv_cache_memory else None),
    }


def _check_memory(config: SSDConfig, vllm_config: VllmConfig, gpus: Gpus, replicas: Replicas, index: int) -> None:
    """Raise ValueError where the drafter shares GPU `index` and would size its KV pages by what others leave free."""
    where, chosen = f"cuda:{index}", named_gpus(config.drafter_device)
    drafters = replicas.known * config.num_drafters
    if chosen and drafters > len(chosen) and not config.kv_cache_memory:
        raise ValueError(
            f"ssd: several drafters share {where}, and none can tell how much memory is its own: set "
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
    """A drafter's part of cores that are for all drafters; all of them where there are fewer than drafters."""
    return list(cpus[drafter::num_drafters] if len(cpus) >= num_drafters else cpus)


def default_cpus() -> list[int]:
    """Cores for drafters: those the server may use and vLLM has bound no worker's threads to.

    vLLM's workers name their own cores in OMP_PLACES, and a user may name those of all in VLLM_CPU_OMP_THREADS_BIND;
    where neither says anything, the last core is taken.
    """
    allowed, bound = sorted(_allowed_cpus()), bound_cpus()
    return [core for core in allowed if core not in bound] if bound and not bound >= set(allowed) else allowed[-1:]


def bound_cpus() -> set[int]:
    """Cores to which vLLM has bound threads of its workers, or will, as far as the environment says."""
    bound = {int(core) for core in re.findall(r"\d+", os.environ.get("OMP_PLACES", ""))}
    for part in os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "").split("|"):
        with contextlib.suppress(ValueError):  # "auto", "nobind" or nothing
            bound |= set(parse_cpus(part))
    return bound


def _allowed_cpus() -> set[int]:
    """Cores of the process that started this worker: vLLM narrows the worker's own affinity."""
    own = os.sched_getaffinity(0)
    try:
        return own | os.sched_getaffinity(os.getppid())
    except OSError:
        return own


def run_on(cpus: Sequence[int]) -> list[int]:
    """Bind this thread alone, and every child that it starts from its first instruction on; no `cpus` bind nothing.

    Returns those of them that it may not run on.
    """
    if not cpus:
        return []
    try:
        os.sched_setaffinity(0, cpus)
        return sorted(set(cpus) - os.sched_getaffinity(0))
    except OSError:
        return sorted(cpus)
