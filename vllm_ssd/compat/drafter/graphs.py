"""Steps recorded once and replayed: CUDA graphs on a GPU, plain calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], object]
"""Runs a recorded step over whatever its buffers hold now."""


class Graphs(Protocol):
    """Records steps."""

    def capture(self, step: Callable[[], None]) -> Replay:
        """Record `step`, which may also be called: its buffers must hold what does no harm.

        What it reads and writes has to stay where it is; what it allocates belongs to all recorded steps, of which one
        runs at a time.
        """
        ...


class CudaGraphs:
    """CUDA graphs that share a memory pool and a stream: each further stream has cuBLAS workspaces of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Replay:
        """As `Graphs.capture`. Not by `torch.cuda.graph`, which collects garbage every time: seconds in all."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            step()  # compiles kernels and fills caches, which a capture must not
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool)
            step()
            graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay


class CalledSteps:
    """Where there are no graphs: a recorded step is the step itself."""

    def capture(self, step: Callable[[], None]) -> Replay:
        """As `Graphs.capture`, without a call."""
        return step


def graphs_on(device: torch.device) -> Graphs:
    """What records steps on `device`."""
    return CudaGraphs(device) if device.type == "cuda" else CalledSteps()
