"""A watch for what makes the host wait for the device: reading a tensor's values."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

READS = {
    "__array__",
    "__bool__",
    "__complex__",
    "__contains__",
    "__float__",
    "__format__",
    "__index__",
    "__int__",
    "__repr__",
    "allclose",
    "cpu",
    "equal",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "tolist",
    "unique",
}


class HostReads(TorchFunctionMode):
    """Names, in `found`, every function by which the calling thread read a tensor or sized one by another's values.

    On the CPU every tensor is the host's, so nothing waits; the same calls would on a GPU. What Triton's interpreter
    reads is not counted: it stands in for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indices = args[1:2] if name in ("__getitem__", "__setitem__") else ()
        masks = [i for index in indices for i in (index if isinstance(index, tuple) else (index,))]
        is_read = name in READS or any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks)
        if is_read and "/triton/runtime/" not in sys._getframe(1).f_code.co_filename:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
