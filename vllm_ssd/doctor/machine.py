"""The machine to examine: this one, or this one with assumed GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Machine:
    """Accelerators, CPU cores and memory. num_gpus: 0 on a CPU; assumed: the GPUs are given by the user."""

    num_gpus: int
    gpu_bytes: int
    num_cores: int
    ram_bytes: int
    assumed: bool = False

    @classmethod
    def here(cls, num_gpus: int, gpu_bytes: int, assumed: bool = False) -> Machine:
        """A machine with these GPUs and this machine's cores and memory."""
        cores = len(os.sched_getaffinity(0))
        return cls(num_gpus, gpu_bytes, cores, psutil.virtual_memory().available, assumed)

    def __str__(self) -> str:
        if not self.num_gpus:
            return f"{self.num_cores} CPU cores, {gib(self.ram_bytes)} of memory available, no GPU"
        of = f" of {gib(self.gpu_bytes)}" if self.gpu_bytes else ""
        return f"{self.num_gpus} GPU{'s' * (self.num_gpus > 1)}{of}{', assumed' * self.assumed}"


def gib(num_bytes: float) -> str:
    """Format a number of bytes in GiB, or in MiB if it is small."""
    if num_bytes < GIB / 10:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"
