"""Steps recorded once and replayed: CUDA graphs on a GPU, plain calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], object]
"""Runs a recorded step over the current contents of its buffers."""


class Graphs(Protocol):
    """Records steps for replay."""

    def capture(self, step: Callable[[], None]) -> Replay:
        """Record `step`, which may be executed while doing so: its buffers must contain harmless inputs.

        The buffers that it reads and writes must keep their addresses. Memory that it allocates is shared by all
        recorded steps, so only one may run at a time.
        """
        ...


class CudaGraphs:
    """CUDA graphs that share a memory pool and one stream, since each further stream needs its own cuBLAS workspace."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], None]) -> Replay:
        """See `Graphs.capture`. Avoids `torch.cuda.graph`, whose garbage collections add up to seconds."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            step()  # compile kernels and fill caches, which is not possible during capture
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool)
            step()
            graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay


class CalledSteps:
    """For devices without CUDA graphs: replaying a step calls it."""

    def capture(self, step: Callable[[], None]) -> Replay:
        """See `Graphs.capture`; does not execute the step."""
        return step


def graphs_on(device: torch.device) -> Graphs:
    """The implementation of `Graphs` for `device`."""
    return CudaGraphs(device) if device.type == "cuda" else CalledSteps()
