"""A drafter that compiles is alive; one that hangs in anything else is not."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from busy_drafter import function_of

from vllm_ssd.drafter.heartbeat import is_compiling
from vllm_ssd.link import process
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.process import DrafterProcess
from vllm_ssd.link.protocol import DrafterStats, Hello, Step

HANG_S = 1.5
BUSY_S = 4.0


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], DrafterProcess]]:
    """Start a drafter that will be in this "module:function" once it is spoken to."""
    monkeypatch.setattr(process, "DRAFTER_MODULE", "busy_drafter")
    monkeypatch.setattr(process, "HANG_S", HANG_S)
    links: list[DrafterProcess] = []

    def start(where: str) -> DrafterProcess:
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        stats: list[DrafterStats] = []
        link = DrafterProcess(
            DrafterOptions({}, 3, 2, None, 2, 8, 4, [], os.getpid()),
            Hello(1, 100, 3, ""),
            environment={
                "VLLM_SSD_BUSY": where,
                "VLLM_SSD_BUSY_S": str(BUSY_S if "sleeps" not in where else 60),
                "PYTHONPATH": os.pathsep.join(path),
            },
            startup_timeout_s=60,
            logger=logging.getLogger("test"),
            on_stats=lambda found, generation: stats.append(found),
        )
        link.stats = stats
        links.append(link)
        link.wait_until_ready()
        link.poll()
        link.send(Step([], 3))
        return link

    yield start
    for link in links:
        link.close()


def poll_until(link: DrafterProcess, done: Callable[[], bool], timeout_s: float) -> float:
    began = time.monotonic()
    while not done() and time.monotonic() - began < timeout_s:
        link.poll(0.02)
    return time.monotonic() - began


@pytest.mark.parametrize("where", ["triton.compiler.compiler:compile", "torch.cuda.graphs:instantiate"])
def test_a_drafter_that_compiles_is_kept(start, where: str) -> None:
    link = start(where)
    took = poll_until(link, lambda: bool(link.stats) or not link.connected, 30.0)
    assert link.connected and link.stats and took > 2 * HANG_S


@pytest.mark.parametrize("where", ["vllm_ssd.drafter.engine:sleeps", "torch.cuda.graphs:sleeps_in_replay"])
def test_a_drafter_that_hangs_is_lost(start, where: str) -> None:
    link = start(where)
    took = poll_until(link, lambda: not link.connected, 30.0)
    assert not link.connected and HANG_S < took, "before it wakes"


def test_what_counts_as_compiling() -> None:
    def inside(module: str, name: str) -> bool:
        found = []
        function = function_of(module, name)
        function.__globals__["sleep"] = lambda seconds: found.append(is_compiling(sys._getframe()))
        function(0)
        return found[0]

    assert inside("triton.compiler.compiler", "compile") and inside("torch._inductor.compile_fx", "compile_fx")
    assert inside("torch.cuda.graphs", "capture_end") and not inside("torch.cuda.graphs", "replay")
    assert not inside("triton.runtime.jit", "run") and not inside("torch._inductor.output_code", "__call__")
    assert not is_compiling(None)


def test_the_modules_that_count_are_there() -> None:
    """Their names are this PyTorch's."""
    import torch._dynamo.convert_frame
    import torch._inductor.compile_fx  # noqa: F401

    for name in ("capture_begin", "capture_end", "instantiate"):
        assert getattr(torch.cuda.graphs.CUDAGraph, name).__module__ == "torch.cuda.graphs"
