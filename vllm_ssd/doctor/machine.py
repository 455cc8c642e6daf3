"""The machine that the doctor is asked about: this one, or one with other GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Machine:
    """Accelerators, CPU cores and memory. num_gpus: 0 on a CPU; assumed: the GPUs are not looked for but given."""

    num_gpus: int
    gpu_bytes: int
    num_cores: int
    ram_bytes: int
    assumed: bool = False

    @classmethod
    def here(cls, num_gpus: int, gpu_bytes: int, assumed: bool = False) -> Machine:
        """This machine's cores and memory beside these GPUs."""
        cores = len(os.sched_getaffinity(0))
        return cls(num_gpus, gpu_bytes, cores, psutil.virtual_memory().available, assumed)

    def __str__(self) -> str:
        if not self.num_gpus:
            return f"{self.num_cores} CPU cores, {gib(self.ram_bytes)} of memory available, no GPU"
        of = f" of {gib(self.gpu_bytes)}" if self.gpu_bytes else ""
        return f"{self.num_gpus} GPU{'s' * (self.num_gpus > 1)}{of}{', assumed' * self.assumed}"


def gib(num_bytes: float) -> str:
    """A number of bytes in words."""
    if num_bytes < GIB / 10:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"
