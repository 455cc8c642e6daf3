"""How many batch sizes run without a whole CUDA graph, by vLLM's own code for capturing and choosing."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm.v1.worker.gpu.spec_decode.ngram", reason="up to 0.31: ssd uses the V1 runner")

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_ssd.compat.target import runner, runner_v2

MODE = CUDAGraphMode.FULL_AND_PIECEWISE
MAX_NUM_BATCHED_TOKENS = 8192
BAR = 0.02
"""Share of all batch sizes that may run without a FULL graph with `adaptive` though they have one without."""


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100 as far as sizes go."""
    monkeypatch.setattr(type(current_platform), "is_device_capability_family", lambda *args, **kwargs: False)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    pool = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", pool)
    runner_v2.install()
    yield


def without_graph(max_num_seqs: int, num_drafts: int, table: list[list[int]] | None) -> dict[int, set[int]]:
    """The batch sizes without a FULL graph, by number of drafts in the table; None: `num_drafts` alone."""
    speculative = SimpleNamespace(
        uses_dynamic_speculative_decoding=lambda: table is not None,
        num_speculative_tokens_per_batch_size=table,
        num_speculative_tokens=num_drafts,
    )
    compilation = SimpleNamespace(
        cudagraph_mode=MODE,
        max_cudagraph_capture_size=None,
        cudagraph_capture_sizes=None,
        post_init_cudagraph_sizes=lambda: None,
    )
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS),
        uniform_decode_query_len=num_drafts + 1,
        speculative_config=speculative,
        performance_mode="balanced",
        num_speculative_tokens=num_drafts,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        additional_config={"ssd": {}},
    )
    VllmConfig._set_cudagraph_sizes(config)
    manager = cudagraph_utils.CudaGraphManager(config, None, MODE, num_drafts + 1)
    manager._graphs_captured = True
    counts = {num_drafts} if table is None else {count for _, _, count in table}
    return {
        count: {
            size
            for size in range(1, max_num_seqs + 1)
            if manager.dispatch(size, size * (count + 1), count + 1, 0).cg_mode != CUDAGraphMode.FULL
        }
        for count in counts
    }


@pytest.mark.parametrize("max_num_seqs", [64, 256, 1024])
@pytest.mark.parametrize("num_drafts", [3, 5, 8])
def test_adaptive_keeps_the_graphs(platform: None, max_num_seqs: int, num_drafts: int) -> None:
    static = without_graph(max_num_seqs, num_drafts, None)[num_drafts]
    assert len(static) < max_num_seqs, "inconclusive: there are no graphs"
    table = runner.drafts_by_batch_size(num_drafts, max_num_seqs)
    for count, sizes in without_graph(max_num_seqs, num_drafts, table).items():
        assert len(sizes - static) <= BAR * max_num_seqs, (count, sorted(sizes - static))


def test_vllm_alone_does_not(platform: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our part can go when this fails."""
    monkeypatch.setattr(runner_v2, "has_ssd", lambda config: False)
    table = runner.drafts_by_batch_size(5, 256)
    static, adaptive = without_graph(256, 5, None), without_graph(256, 5, table)
    assert len(adaptive[5] - static[5]) > BAR * 256
