"""Where the drafters of a configuration run: the one place that asks `link.placement`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from vllm.config import VllmConfig

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.placement import place_drafter


@dataclass(frozen=True, slots=True)
class Placed:
    """One replica's drafter. device: what CUDA_VISIBLE_DEVICES would say, None on a CPU."""

    options: DrafterOptions
    environment: dict[str, str | None]

    @property
    def device(self) -> str | None:
        return self.environment.get("CUDA_VISIBLE_DEVICES")


def place(config: SSDConfig, target: VllmConfig, replica: int, *, is_cpu: bool) -> Placed:
    """The drafter of a data-parallel replica; raises ValueError where there is no place for it."""
    of_replica = copy.copy(target)
    of_replica.parallel_config = copy.copy(target.parallel_config)
    of_replica.parallel_config.data_parallel_rank_local = replica
    return Placed(*place_drafter(config, of_replica, is_cpu=is_cpu))
