"""`python drive_engine.py`: the drafter's engine over the kernels as they run here, on a model made of torch ops.

On a GPU its steps are captured and replayed; elsewhere `TRITON_INTERPRET=1` interprets the kernels, but for `sample`,
of which that takes seconds a step. What is drafted and every page are checked as in `tests/unit/test_engine.py`. Prints
how many steps were run, and how many of their kinds were captured.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import test_engine
import test_engine_pages
from engine_target import Target, drive

from vllm_ssd.compat.drafter.paged import TreeBatch
from vllm_ssd.drafter import device_steps
from vllm_ssd.kernels import copy_pages, reference_ops, sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULUS = 2**31 - 1


class HashModel:
    """Logits are a hash of the prefix that is read back through the page tables, by ops that a graph can hold."""

    tree_attention = True
    vocab_size = 13
    page_size = 4
    dtype = torch.float32
    device = DEVICE

    def __init__(self, num_pages: int, max_model_len: int = 120, mask_token_id: int | None = None) -> None:
        self.mask_token_id = mask_token_id
        self.num_pages, self.max_model_len, self.num_forwards = num_pages, max_model_len, 0
        self.kv = torch.full((num_pages + 1, self.page_size), MODULUS // 3, device=DEVICE)  # the last page is scrap
        random_numbers = torch.Generator().manual_seed(0)
        numbers = torch.randint(1, MODULUS, (2 * max_model_len + 2 * self.vocab_size,), generator=random_numbers)
        self.of_position = numbers[: 2 * max_model_len].to(DEVICE)
        self.factors, self.offsets = numbers[2 * max_model_len :].to(DEVICE).chunk(2)

    def warm_up(self, sizes: Sequence[int]) -> int:
        return 0

    def forward(self, batch: TreeBatch) -> torch.Tensor:
        self.num_forwards += 1
        scrap = self.num_pages * self.page_size
        self.kv.view(-1).index_copy_(0, batch.slots.where(batch.slots >= 0, scrap), batch.token_ids.long())
        row = torch.arange(len(batch.token_ids), device=DEVICE, dtype=torch.int32)
        request = torch.searchsorted(batch.query_start_loc[1:], row, right=True)
        request = request.clamp(max=len(batch.page_tables) - 1)  # of padding: any
        trunk = self.kv[batch.page_tables[request].clamp(min=0)].flatten(1)
        own = self.kv[batch.own_pages.clamp(min=0)].flatten(1)
        shared_lens, own_lens = batch.shared_lens[:, None], batch.own_lens[:, None]
        in_trunk = torch.arange(trunk.shape[1], device=DEVICE).expand_as(trunk)
        in_own = torch.arange(own.shape[1], device=DEVICE).expand_as(own)
        state = self.hashed(trunk, in_trunk.where(in_trunk < shared_lens, -1))
        state = state + self.hashed(own, (shared_lens + in_own).where(in_own < own_lens, -1))
        logits = self.logits(state)
        return logits if batch.logit_indices is None else logits[batch.logit_indices]

    def hashed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of each row at their positions, -1 for none."""
        numbers = self.of_position[positions.clamp(0, len(self.of_position) - 1)]
        return ((tokens + 1) * numbers % MODULUS).masked_fill(positions < 0, 0).sum(1)

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        hashed = (state[:, None] % MODULUS * self.factors + self.offsets) % MODULUS
        return 10 * hashed.float() / MODULUS

    def reference_logits(self, prefix: list[int]) -> torch.Tensor:
        tokens = torch.tensor([prefix], device=DEVICE)
        return self.logits(self.hashed(tokens, torch.arange(len(prefix), device=DEVICE)[None]))[0].cpu()

    def copy_slots(self, sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor) -> None:
        copy_pages([self.kv.view(len(self.kv), self.page_size, 1, 1)], sources, destinations, num_slots)


def make_target(num_pages: int = 400, **options) -> Target:
    """As the fixture of `tests/unit`."""
    return Target(HashModel(num_pages), **options)


def main() -> None:
    if DEVICE.type == "cpu":
        device_steps.sample = reference_ops()(sample)
    test_engine.test_hit_recomputes_nothing(make_target)
    test_engine.test_just_in_time_speculation_becomes_the_spine(make_target)
    test_engine.test_an_end_between_steps_leaves_the_others_growing(make_target)
    test_engine_pages.test_shared_prompts_share_pages(make_target)
    target = make_target(num_pages=90, max_num_seqs=3)
    drive(target, random.Random(0), 40)
    drive(Target(HashModel(90, mask_token_id=4), max_num_seqs=3), random.Random(1), 15)
    stepper = target.engine._stepper
    captured = stepper._runner.num_captured
    print(json.dumps({"steps": stepper.num_steps, "captured": captured, "eager": stepper.num_eager_steps}))


if __name__ == "__main__":
    main()
