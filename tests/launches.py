"""A watch for what a step costs the host and the target's stream: launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction


@contextmanager
def watched_kernels(names: list[str]) -> Iterator[None]:
    """Append the name of every Triton kernel that runs to `names`, natively or by its interpreter."""
    call, run = GridExecutor.__call__, JITFunction.run

    def interpret(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        names.append(executor.fn.__name__)
        with _disable_current_modes():  # what the interpreter does stands for the device
            call(executor, *args, **kwargs)

    def launch(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
        names.append(function.fn.__name__)
        with _disable_current_modes():
            return run(function, *args, **kwargs)

    GridExecutor.__call__, JITFunction.run = interpret, launch
    try:
        yield
    finally:
        GridExecutor.__call__, JITFunction.run = call, run


class Launches(TorchDispatchMode):
    """Names, in `names`, every Triton kernel and every ATen op but views that the calling thread ran.

    Allocations count as well: they take the host's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __enter__(self) -> Launches:
        self._kernels = watched_kernels(self.names)
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._kernels.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
