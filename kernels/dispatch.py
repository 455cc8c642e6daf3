"""Choose between the Triton and the reference implementation of an op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton import knobs

_references_wanted = False


@contextmanager
def reference_ops() -> Iterator[None]:
    """Within this context every op runs as its PyTorch reference."""
    global _references_wanted
    before, _references_wanted = _references_wanted, True
    try:
        yield
    finally:
        _references_wanted = before


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether ops on `tensor` run as Triton kernels: on a GPU, or under Triton's interpreter.

    Everywhere else, and within `reference_ops`, the op's PyTorch reference runs. The interpreter needs
    `TRITON_INTERPRET=1` from before Triton was imported.
    """
    return not _references_wanted and (tensor.is_cuda or knobs.runtime.interpret)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`; Triton's own function takes a microsecond."""
    return 1 << (size - 1).bit_length()


def require_contiguous(*tensors: torch.Tensor) -> None:
    """Raise ValueError for tensors that are not contiguous, as kernels assume."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
