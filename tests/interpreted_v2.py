"""Importing this lets vLLM's V2 model runner work on the CPU, asynchronously scheduled.

Its kernels run under Triton's interpreter, which `TRITON_INTERPRET=1` must have asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import quick_interpreter  # noqa: F401
import triton
import triton.language as tl
from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)  # vLLM looks for it

from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils  # noqa: E402


@triton.jit
def log1p(x):
    """The interpreter has no libdevice."""
    return tl.log(1 + x)


def keep_async_scheduling(config: Any) -> None:
    """vLLM's own function, but for asynchronous scheduling, which it switches off on every CPU."""
    asked = config.scheduler_config.async_scheduling
    check_and_update_config(config)
    config.scheduler_config.async_scheduling = asked


topk_topp_sampler.HAS_TRITON = False  # its Triton kernel does not run interpreted: take what vLLM has for a CPU
rejection_sampler_utils.tldevice = SimpleNamespace(log1p=log1p)
check_and_update_config = CpuPlatform.check_and_update_config
CpuPlatform.check_and_update_config = staticmethod(keep_async_scheduling)
