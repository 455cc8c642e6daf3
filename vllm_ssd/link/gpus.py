"""Choose a drafter's GPU: one that no target on the node uses, unless the user names one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpus:
    """The GPUs that are visible to this worker's process, by index.

    names: each GPU's name in CUDA_VISIBLE_DEVICES: a number, a UUID or a MIG instance
    current: index of the worker's own GPU
    physical_id: maps a name to the number used in vLLM's `assigned_physical_gpu_ids`
    """

    names: Sequence[str]
    current: int
    physical_id: Callable[[str], int] = int


@dataclass(frozen=True)
class Replicas:
    """The target's data-parallel replicas on this node, each with its own drafters.

    index: of this worker's replica; number: 0 if servers that this one does not know of may run others
    """

    index: int
    number: int

    @property
    def known(self) -> int:
        """Lower bound on the number of replicas on this node."""
        return max(self.number, self.index + 1)


def visible_names(visible: str | None, count: int) -> list[str]:
    """Names of the `count` GPUs that CUDA enumerates with CUDA_VISIBLE_DEVICES set to `visible`.

    With MIG instances all names are returned, although CUDA gives a process only one of them.
    """
    if not visible:  # Ray may set it to "", which vLLM treats as unset
        return [str(index) for index in range(count)]
    names = [name.strip() for name in visible.split(",")]
    return names if any(name.startswith("MIG-") for name in names) else names[:count]


def drafter_gpu(
    device: str | None, parallel: Any, gpus: Gpus, replicas: Replicas, drafter: int = 0, num_drafters: int = 1
) -> int:
    """Index of the GPU for one of this replica's drafters.

    device: the user's `drafter_device`; several indices are assigned to the drafters in turn
    parallel: vLLM's `ParallelConfig`
    drafter, num_drafters: index of the drafter in its replica, and drafters per replica

    Raises ValueError, naming the key, if the user names a GPU that does not exist or no GPU is known to be free.
    """
    number = len(gpus.names)
    chosen = named_gpus(device)
    place = replicas.index * num_drafters + drafter
    if chosen:
        index = chosen[place % len(chosen)]
        if index >= number:
            raise ValueError(
                f"ssd: drafter_device {device!r}: the server sees {_gpus(number)}, the last index is {number - 1}"
            )
        return index
    if not replicas.number:
        raise ValueError(
            "ssd: other data-parallel replicas may use any GPU that this server sees: set drafter_device, or give each "
            "server GPUs of its own by CUDA_VISIBLE_DEVICES"
        )
    targets = target_gpus(parallel, gpus, replicas)
    free = [index for index in _preferred(parallel, gpus) if index not in targets]
    if place < len(free):
        return free[place]
    if free:
        raise ValueError(
            f"ssd: {_gpus(len(free))} for {num_drafters * replicas.number} drafters: let them share with "
            f'drafter_device "cuda:{free[0]}" and kv_cache_memory'
        )
    raise ValueError(
        f"ssd: the server sees {_gpus(number)}, and the target uses all: show it one more, or let the drafter share "
        f'one with drafter_device "cuda:{gpus.current}" and kv_cache_memory'
    )


def named_gpus(device: str | None) -> list[int]:
    """The indices in a `drafter_device` such as "cuda:1" or "cuda:2,3"."""
    numbers = (device or "").partition(":")[2]
    return [int(number) for number in numbers.split(",")] if numbers else []


def target_gpus(parallel: Any, gpus: Gpus, replicas: Replicas) -> set[int]:
    """Indices of the GPUs that targets on this node use, as far as this server knows."""
    spans_nodes = parallel.nnodes_within_dp > 1
    number = local_world_size(parallel) * (1 if spans_nodes else replicas.known)
    assigned = parallel.assigned_physical_gpu_ids
    if assigned is None:
        return {*range(number), gpus.current}
    mine = set(assigned if parallel.use_ray else assigned[:number])  # with Ray: only those of workers on this node
    return {index for index, name in enumerate(gpus.names) if _physical_id(gpus, name) in mine} | {gpus.current}


def local_world_size(parallel: Any) -> int:
    """Number of ranks of one replica on this node."""
    if parallel.distributed_executor_backend == "external_launcher":
        return min(_ranks_a_replica(parallel), _from_torchrun("LOCAL_WORLD_SIZE", parallel.world_size))
    return parallel.local_world_size


def replicas_here(parallel: Any, started: int) -> Replicas:
    """The replicas on this node; started: how many this worker's server runs here, 0 if there may be others."""
    if parallel.distributed_executor_backend == "external_launcher":  # every rank of every replica is a server
        ranks = _ranks_a_replica(parallel)
        index = _from_torchrun("LOCAL_RANK", 0) // ranks
        return Replicas(index, max(_from_torchrun("LOCAL_WORLD_SIZE", parallel.world_size) // ranks, index + 1))
    index = parallel.data_parallel_rank_local or 0
    return Replicas(index, max(started, index + 1) if started else 0)


def _from_torchrun(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def _ranks_a_replica(parallel: Any) -> int:
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.prefill_context_parallel_size


def _preferred(parallel: Any, gpus: Gpus) -> list[int]:
    """All indices, those in `--device-ids` first: any that the target leaves unused are meant for the drafter."""
    assigned = parallel.assigned_physical_gpu_ids or ()
    if not assigned:
        return list(range(len(gpus.names)))
    return sorted(range(len(gpus.names)), key=lambda index: _physical_id(gpus, gpus.names[index]) not in assigned)


def _physical_id(gpus: Gpus, name: str) -> int:
    try:
        return gpus.physical_id(name)
    except Exception as error:  # whatever the driver's library raises
        raise ValueError(
            f"ssd: cannot tell which GPU {name!r} of CUDA_VISIBLE_DEVICES is ({error}): set drafter_device"
        ) from error


def _gpus(number: int) -> str:
    return "one GPU" if number == 1 else f"{number} GPUs"
