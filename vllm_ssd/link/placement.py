"""Where the drafter runs and what vLLM is told there: cores or device, memory, environment.

Each data-parallel replica of the target has a drafter of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_ssd.config import REPLICAS_ENV, SSDConfig, parse_cpus
from vllm_ssd.link.options import DrafterOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_KV_CACHE_BYTES = 512 << 20
"""KV memory of a drafter on the CPU when the user names none."""


def place_drafter(
    config: SSDConfig, vllm_config: VllmConfig, *, is_cpu: bool
) -> tuple[DrafterOptions, dict[str, str | None]]:
    """The drafter's start options, and what its environment changes.

    An environment value of None removes the variable.
    """
    device = config.drafter_device or ("cpu" if is_cpu else None)
    if is_cpu and device != "cpu":
        raise ValueError(f"ssd: drafter_device must be 'cpu' when the target runs on the CPU, got {device!r}")
    if device == "cpu" and not is_cpu:
        raise ValueError("ssd: drafter_device 'cpu' needs a CPU build of vLLM; this one is built for a GPU")
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    replica = parallel.data_parallel_rank_local or 0
    num_replicas = max(int(os.environ.get(REPLICAS_ENV, "1")), replica + 1)
    target_len = vllm_config.model_config.max_model_len
    engine_args = {
        "model": config.model,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "enforce_eager": config.enforce_eager,
        "max_model_len": min(config.max_model_len, target_len) if config.max_model_len else None,
        "target_max_model_len": target_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "load_format": "auto",
        "seed": 0,
    }
    environment: dict[str, str | None] = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # torch.distributed listens even in a world of one
    cpus: list[int] = []
    if is_cpu:
        cpus = share(parse_cpus(config.drafter_cpus) if config.drafter_cpus else default_cpus(), replica, num_replicas)
        engine_args["kv_cache_memory_bytes"] = config.kv_cache_memory or CPU_KV_CACHE_BYTES
        places = ",".join(map(str, cpus))
        environment |= {
            "OMP_NUM_THREADS": str(len(cpus)),
            "OMP_PLACES": f"{{{places}}}",
            "OMP_PROC_BIND": "true",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TRITON_INTERPRET": None,  # a target on the V2 runner may need it; here it would only be slow
            "VLLM_CPU_KVCACHE_SPACE": None,  # the target's; it would override kv_cache_memory_bytes
        }
    else:
        environment["CUDA_VISIBLE_DEVICES"] = visible_device(
            device, num_replicas * parallel.world_size + replica, os.environ.get("CUDA_VISIBLE_DEVICES")
        )
        if config.kv_cache_memory:
            engine_args["kv_cache_memory_bytes"] = config.kv_cache_memory
        if config.gpu_memory_utilization:
            engine_args["gpu_memory_utilization"] = config.gpu_memory_utilization
        if config.drafter_cpus:
            cpus = share(parse_cpus(config.drafter_cpus), replica, num_replicas)
    options = DrafterOptions(
        engine_args={key: value for key, value in engine_args.items() if value is not None},
        num_speculative_tokens=config.num_speculative_tokens,
        fan_out=list(config.fan_out) if isinstance(config.fan_out, tuple) else config.fan_out,
        branch_budget=config.branch_budget,
        max_num_seqs=scheduler.max_num_seqs,
        max_branches=config.max_branches,
        top_m=config.top_m,
        saguaro_c=config.saguaro_c,
        cpus=cpus,
        parent_pid=os.getpid(),
        tree_attention=config.tree_attention and not is_cpu,
    )
    return options, environment


def share(cpus: Sequence[int], replica: int, num_replicas: int) -> list[int]:
    """The replica's part of cores that are for all drafters; all of them where there are fewer than drafters."""
    return list(cpus[replica::num_replicas] if len(cpus) >= num_replicas else cpus)


def default_cpus() -> list[int]:
    """Cores for drafters: those the server may use and vLLM has bound no worker's threads to.

    vLLM's workers name their own cores in OMP_PLACES, and a user may name those of all in VLLM_CPU_OMP_THREADS_BIND;
    where neither says anything, the last core is taken.
    """
    allowed = sorted(_allowed_cpus())
    bound = {int(core) for core in re.findall(r"\d+", os.environ.get("OMP_PLACES", ""))}
    for part in os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "").split("|"):
        with contextlib.suppress(ValueError):  # "auto", "nobind" or nothing
            bound |= set(parse_cpus(part))
    return [core for core in allowed if core not in bound] if bound and not bound >= set(allowed) else allowed[-1:]


def _allowed_cpus() -> set[int]:
    """Cores of the process that started this worker: vLLM narrows the worker's own affinity."""
    own = os.sched_getaffinity(0)
    try:
        return own | os.sched_getaffinity(os.getppid())
    except OSError:
        return own


def visible_device(device: str | None, default: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of the drafter: `device` ("cuda:N") of the server's devices, else number `default`."""
    index = int(device.partition(":")[2] or 0) if device else default
    if visible:
        devices = visible.split(",")
        if index >= len(devices):
            raise ValueError(
                f"ssd: the drafter wants device {index} of CUDA_VISIBLE_DEVICES={visible}, which has {len(devices)}; "
                "set drafter_device (it may share the target's GPU, with gpu_memory_utilization for each)"
            )
        return devices[index]
    return str(index)
