"""What lets the GPU's benchmarks run on a CPU at toy size, to see that they run; its times mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import bench_kernels
import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Whoever asks for a tensor on a GPU, or one in pinned memory, gets one on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if kwargs.get("dtype") == torch.bfloat16:  # the interpreter's bfloat16 dot is wrong
            kwargs["dtype"] = torch.float16
        return function(*args, **kwargs)


def once_us(step: Callable[[], object]) -> float:
    """The time of one call, in place of a median of graph replays."""
    began = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - began)


@contextmanager
def benchmarks_on_cpu() -> Iterator[None]:
    """Let the functions of bench_kernels.py run here, over kernels that Triton's interpreter runs."""
    with (
        patch.multiple(bench_kernels, median_us=once_us, CYCLED_BYTES=0, VOCAB_SIZE=2048, LAYERS=1),
        patch.object(torch.cuda, "synchronize", lambda: None),
        OnCpu(),
    ):
        yield
