"""Memory of the target's device that ssd takes at vLLM's defaults on a large GPU, added up on tensors without data."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from fake_speculator import built
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_ssd.compat.target.runner_v2 import LowestFirst
from vllm_ssd.target.v2 import speculator

MAX_NUM_SEQS, VOCAB_SIZE, K = 1024, 151_936, 5
"""vLLM's default on an 80 GB GPU, the vocabulary of Qwen3, and ours."""
BAR_BYTES = 10**9


class Allocations(TorchDispatchMode):
    """The storages that come into being on the device "meta", in `bytes` by address of the object."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "meta" and not func.is_view:
            storage = out.untyped_storage()
            self.storages[storage._cdata] = storage
        return out

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("max_model_len", [40_960, 131_072])
def test_extra_memory_stays_below_the_bar(caplog: pytest.LogCaptureFixture, max_model_len: int) -> None:
    """With the dense table of tokens that vLLM makes for the method that we pass for; said at start."""
    caplog.set_level(logging.INFO)
    logger = speculator.logger
    propagate, logger.propagate = logger.propagate, True
    try:
        with (
            Allocations() as allocations,
            built(
                "meta",
                num_slots=MAX_NUM_SEQS,
                vocab_size=VOCAB_SIZE,
                max_model_len=max_model_len,
                num_speculative_tokens=K,
            ) as made,
        ):
            assert made.draft_logits.shape[0] >= 64, "too few requests can sample with their proposals known"
    finally:
        logger.propagate = propagate
    total = allocations.num_bytes + 4 * MAX_NUM_SEQS * max_model_len
    assert 10**8 < total <= BAR_BYTES
    (told,) = [record.getMessage() for record in caplog.records if "GB of the target's device" in record.getMessage()]
    assert abs(float(told.split("about ")[1].split(" GB")[0]) - total / 1e9) < 0.05


def test_requests_take_the_slots_that_have_room_for_proposals() -> None:
    slots = LowestFirst(range(8))
    taken = [slots.pop() for _ in range(5)]
    assert taken == [0, 1, 2, 3, 4] and len(slots) == 3
    for slot in (3, 1, 4):
        slots.append(slot)
    assert [slots.pop() for _ in range(6)] == [1, 3, 4, 5, 6, 7] and not slots
