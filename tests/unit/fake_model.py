"""A paged model without weights whose next token depends on every token it reads through its pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch

POISON = -7


class FakePagedModel:
    """KV pages hold token ids; logits are a hash of the whole prefix read back through the page table.

    A wrong page, a missing copy or KV left from a dead branch changes the hash, so a draft that equals
    `reference_logits`' choice proves that the pages held exactly the right prefix.
    """

    vocab_size = 13
    page_size = 4
    weight_bytes = kv_bytes = logit_bytes = 0
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(
        self,
        num_pages: int,
        max_model_len: int = 200,
        tree_attention: bool = False,
        mask_token_id: int | None = None,
    ) -> None:
        self.tree_attention = tree_attention
        self.mask_token_id = mask_token_id
        self.num_pages = num_pages
        self.max_model_len = max_model_len
        self.kv = np.full((num_pages, self.page_size), POISON, np.int64)
        self.num_forwards = self.num_tokens = 0

    def warm_up(self, sizes: Sequence[int]) -> int:
        return 0

    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        self.num_forwards += 1
        self.num_tokens += len(batch.token_ids)
        assert batch.token_ids.dtype in (torch.int32, np.int32), "vLLM compiles its models for int32"
        if isinstance(batch, TreeBatch):
            return self._forward_trees(batch)
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens were written to one slot"
        self.kv[batch.slots // self.page_size, batch.slots % self.page_size] = batch.token_ids
        rows = []
        for i, seq_len in enumerate(batch.seq_lens.tolist()):
            start, stop = batch.query_start_loc[i : i + 2].tolist()
            prefix = self.kv[batch.page_tables[i]].reshape(-1)[:seq_len].tolist()
            assert batch.positions[start:stop].tolist() == list(range(seq_len - (stop - start), seq_len))
            assert prefix[seq_len - (stop - start) :] == batch.token_ids[start:stop].tolist()
            rows += [reference_logits(prefix[: seq_len - (stop - start) + j + 1]) for j in range(stop - start)]
        return torch.stack(rows)[torch.from_numpy(batch.logit_indices)]

    def _forward_trees(self, batch: TreeBatch) -> torch.Tensor:
        slots, token_ids = batch.slots.numpy(), batch.token_ids.numpy()
        real = slots >= 0
        assert len(set(slots[real].tolist())) == real.sum(), "two tokens were written to one slot"
        self.kv[slots[real] // self.page_size, slots[real] % self.page_size] = token_ids[real]
        rows = []
        for i, (start, stop) in enumerate(zip(batch.query_start_loc.tolist(), batch.query_start_loc[1:].tolist())):
            assert stop - start <= batch.max_rows
            for token in range(start, stop):
                shared, own = int(batch.shared_lens[token]), int(batch.own_lens[token])
                if not real[token]:
                    assert shared + own == 0, "padding reads KV"
                    rows.append(torch.zeros(self.vocab_size))
                    continue
                assert shared <= batch.max_shared_len and shared + own == batch.positions[token] + 1
                trunk = self.kv[batch.page_tables[i].numpy()].reshape(-1)[:shared].tolist()
                prefix = trunk + self.kv[batch.own_pages[token].numpy()].reshape(-1)[:own].tolist()
                assert prefix[-1] == token_ids[token]
                rows.append(reference_logits(prefix))
        assert not real[len(rows) :].any(), "a token of no request"
        rows += [torch.zeros(self.vocab_size)] * (len(real) - len(rows))
        logits = torch.stack(rows)
        return logits if batch.logit_indices is None else logits[batch.logit_indices]

    def copy_slots(self, sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor) -> None:
        copies = zip(sources.flatten().tolist(), destinations.flatten().tolist(), num_slots.flatten().tolist())
        for source, destination, n in copies:
            self.kv[destination, :n] = self.kv[source, :n]

    @staticmethod
    def reference_logits(prefix: list[int]) -> torch.Tensor:
        return reference_logits(prefix)

    def copy_pages(self, sources: list[int], destinations: list[int]) -> None:
        self.kv[destinations] = self.kv[sources]


def reference_logits(prefix: list[int]) -> torch.Tensor:
    """Logits `[vocab]` after `prefix`, distinct for all tokens."""
    assert POISON not in prefix, "read KV that nobody wrote"
    state = 17
    for token in prefix:
        state = (state * 31 + token + 1) % 1000003
    order = np.random.default_rng(state).permutation(FakePagedModel.vocab_size)
    return torch.from_numpy(order.astype(np.float32))
