"""Place the drafters of a configuration with `link.placement`, as its workers would."""

from __future__ import annotations

import copy
import os

from vllm.config import VllmConfig

from vllm_ssd.config import REPLICAS_ENV, SSDConfig
from vllm_ssd.doctor.machine import Machine
from vllm_ssd.link.gpus import Gpus, replicas_here, target_gpus, visible_names
from vllm_ssd.link.placement import Placement, place_drafter


def gpus_of(machine: Machine, current: int = 0) -> Gpus | None:
    """The machine's GPUs as a worker on GPU `current` would see them; None on a CPU."""
    if not machine.num_gpus:
        return None
    visible = None if machine.assumed else os.environ.get("CUDA_VISIBLE_DEVICES")
    return Gpus(visible_names(visible, machine.num_gpus), current)


def place(config: SSDConfig, target: VllmConfig, replica: int, machine: Machine, drafter: int = 0) -> Placement:
    """Place a drafter of a data-parallel replica; raises ValueError if that is not possible."""
    of_replica = copy.copy(target)
    of_replica.parallel_config = parallel = copy.copy(target.parallel_config)
    if parallel.data_parallel_size > 1:
        parallel.data_parallel_rank_local = replica
    own = parallel.assigned_physical_gpu_ids or range((replica + 1) * parallel.world_size)
    current = list(own)[min(replica * parallel.world_size, len(own) - 1)]
    return place_drafter(config, of_replica, gpus_of(machine, current), drafter)


def targets(target: VllmConfig, machine: Machine) -> list[int]:
    """Indices of the GPUs that targets on this node use."""
    parallel = target.parallel_config
    gpus = gpus_of(machine, (parallel.assigned_physical_gpu_ids or [0])[0])
    started = int(os.environ.get(REPLICAS_ENV, "1"))
    return [] if gpus is None else sorted(target_gpus(parallel, gpus, replicas_here(parallel, started)))
