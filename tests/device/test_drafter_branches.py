"""What the drafter does on a GPU only, under stand-ins: how prompts are read, where steps are captured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda

from vllm_ssd.compat.drafter.graphs import graphs_on
from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch
from vllm_ssd.drafter.engine import PREFILL_TOKENS_PER_STEP
from vllm_ssd.drafter.server import build_engine
from vllm_ssd.policy import FanOut

K = 3
PROMPT = 32_000


class Counting:
    """A paged model whose logits are all alike; the number of tokens of each forward is kept."""

    vocab_size, page_size, max_model_len = 13, 16, PROMPT + 1000
    num_pages = max_model_len // page_size + 8
    weight_bytes = kv_bytes = logit_bytes = 0
    dtype, tree_attention, mask_token_id = torch.float32, False, None

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.forwards: list[int] = []

    def warm_up(self, sizes: object) -> int:
        return 0

    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        self.forwards.append(len(batch.token_ids))
        assert batch.logit_indices is not None
        return torch.zeros(len(batch.logit_indices), self.vocab_size)

    def copy_pages(self, sources: list[int], destinations: list[int]) -> None:
        pass

    def copy_slots(self, sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor) -> None:
        raise AssertionError("these are pages of the host")


@pytest.mark.parametrize(("device", "most_steps"), [("cuda:0", 16), ("cpu", 125)])
def test_a_long_prompt_is_read_in_few_steps(device: str, most_steps: int) -> None:
    """Meanwhile the branches of other requests are launched one by one, a few of them with each piece of the prompt."""
    model = Counting(device)
    engine = build_engine(
        model,
        FanOut(K, 2),
        num_speculative_tokens=K,
        max_num_seqs=2,
        max_branches=8,
        max_fan_out=2,
        top_m=5,
        seed=0,
    )
    engine.open("long", 0, np.zeros(PROMPT, np.int32), 0.0, K)
    while engine._unfinished:
        engine.speculate()
    assert sum(model.forwards) == PROMPT
    assert len(model.forwards) == most_steps and max(model.forwards) == PREFILL_TOKENS_PER_STEP[device[:4].rstrip(":")]


class Graph:
    """In place of a CUDA graph: where it was captured."""

    made: list[tuple[Any, Any]] = []

    def capture_begin(self, pool: Any) -> None:
        self.made.append((torch.cuda.current_stream(), pool))

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass


def test_all_captures_share_a_stream_and_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream that cuBLAS has run on keeps a workspace of 32 MiB."""
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    with FakeCuda(num_devices=2) as cuda:
        graphs = graphs_on(torch.device("cuda:1"))
        for _ in range(5):
            graphs.capture(lambda: None)()
        own = [stream for stream in cuda.streams if stream not in cuda.defaults]
        assert len(own) == 1 and own[0].device == torch.device("cuda:1")
    streams, pools = zip(*Graph.made)
    assert len(streams) == 5 and set(streams) == set(own) and len(set(pools)) == 1
