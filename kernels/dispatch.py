"""Which implementation of an op runs."""

from __future__ import annotations

import torch
from triton import knobs


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on `tensor` run as Triton kernels: on a GPU, or under Triton's interpreter.

    Everywhere else the op's PyTorch reference runs. The interpreter needs `TRITON_INTERPRET=1` from before Triton was
    imported.
    """
    return tensor.is_cuda or knobs.runtime.interpret


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`; Triton's own takes the host a microsecond."""
    return 1 << (size - 1).bit_length()


def require_contiguous(*tensors: torch.Tensor) -> None:
    """Refuse a tensor whose elements a kernel would look for in the wrong place."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
