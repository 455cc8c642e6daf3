"""Make vLLM build configurations for the GPUs of another machine, for `vllm-ssd doctor --assume-gpus`."""

from __future__ import annotations

import importlib
import sys
import types

from vllm_ssd.compat import patch

EXTENSION = "_C_stable_libtorch"
"""vLLM's compiled CUDA operations, which a CPU build lacks and configurations do not call."""


def assume_gpus(count: int, memory_bytes: int) -> None:
    """Make vLLM in this process assume `count` CUDA devices of compute capability 9.0, with Triton.

    Only for processes that build configurations. Must be called before vLLM detects its platform; cannot be undone.
    """
    try:
        importlib.import_module(f".{EXTENSION}", "vllm")
    except ImportError:
        sys.modules[f"vllm.{EXTENSION}"] = types.ModuleType(f"vllm.{EXTENSION}")
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class AssumedGPUs(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "assumed GPU"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return memory_bytes

        @classmethod
        def device_count(cls) -> int:
            return count

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            return True

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    patch.assume("vllm.platforms:_current_platform", AssumedGPUs())
    patch.assume("vllm.triton_utils:HAS_TRITON", True)
    patch.assume("vllm.config.vllm:HAS_TRITON", True)
