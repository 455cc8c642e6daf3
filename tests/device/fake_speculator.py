"""An `SSDSpeculator` without vLLM's engine, drafter process or device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from vllm_ssd.config import SSDConfig
from vllm_ssd.link.fleet import Fleet
from vllm_ssd.target.metrics import Metrics
from vllm_ssd.target.v2 import speculator


class NgramDrafts:
    """In place of vLLM's n-gram drafter: the same drafts for every row."""

    def __init__(self, num_slots: int, num_drafts: int, device: Any) -> None:
        self._drafts = torch.zeros(num_slots, num_drafts, dtype=torch.int64, device=device)

    def propose(self, batch: Any, **_: Any) -> torch.Tensor:
        return self._drafts[: batch.num_reqs]


@contextmanager
def built(
    device: str, *, num_slots: int, vocab_size: int, max_model_len: int = 4096, **user: Any
) -> Iterator[speculator.SSDSpeculator]:
    """The speculator of a target with `num_slots` = max_num_seqs, and of a user's keys."""
    config = SSDConfig.from_user({"model": "x", **user})
    num_drafts = config.num_speculative_tokens
    vllm_config: Any = SimpleNamespace(
        max_concurrent_batches=2,
        scheduler_config=SimpleNamespace(max_num_seqs=num_slots),
        model_config=SimpleNamespace(get_vocab_size=lambda: vocab_size, max_model_len=max_model_len),
    )
    req_states = SimpleNamespace(
        free_indices=list(range(num_slots)),
        total_len=SimpleNamespace(gpu=torch.zeros(num_slots, dtype=torch.int32, device=device)),
        last_sampled_tokens=torch.zeros(num_slots, 1, dtype=torch.int64, device=device),
    )
    link = mock.Mock(
        generation=0, connected=False, max_model_len=max_model_len, poll=lambda timeout_s: [], descriptor=lambda: -1
    )
    replaced = {
        "user_config": lambda vllm_config: config,
        "start_drafters": lambda config, vllm_config: (Metrics(num_drafts, speculator.logger), Fleet([link])),
        "get_tp_group": lambda: SimpleNamespace(rank_in_group=0, world_size=1),
        "install": lambda: None,
        "ngram_speculator": lambda vllm_config, device, req_states: NgramDrafts(num_slots, num_drafts, device),
    }
    with mock.patch.multiple(speculator, **replaced):
        yield speculator.SSDSpeculator(vllm_config, torch.device(device), req_states)


def batch(slots: torch.Tensor) -> SimpleNamespace:
    """vLLM's `InputBatch` of one row for each of `slots` [B] int64 on the host, on the fake device "cuda"."""
    return SimpleNamespace(
        num_reqs=len(slots),
        idx_mapping=slots.to("cuda:0"),
        idx_mapping_np=slots.numpy(),
        num_draft_tokens_per_req=None,
    )
