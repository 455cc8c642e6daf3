"""What the drafter's engine and a draft model agree on; no vLLM needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class UnsupportedDraftModel(ValueError):
    """The draft model cannot draft, with whatever attention."""


@dataclass(slots=True)
class ForwardBatch:
    """One ragged forward over `B` sequences and `T` tokens; every array lives on the host.

    token_ids [T] int32, positions [T] int64, slots [T] int64 (page * page_size + offset),
    query_start_loc [B + 1] int32, seq_lens [B] int32 (KV length after this forward),
    page_tables [B, P] int32, logit_indices [n] int64 into the T tokens.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    query_start_loc: np.ndarray
    seq_lens: np.ndarray
    page_tables: np.ndarray
    logit_indices: np.ndarray


@dataclass(slots=True)
class TreeBatch:
    """One forward over `B` tokens of `R` requests' trees, those of a request adjacent; pages live on the device.

    token_ids [B] int32, positions [B] int64, slots [B] int64; page_tables [R, W] int32, query_start_loc [R + 1] int32,
    shared_lens [B] int32, own_pages [B, Q] int32 and own_lens [B] int32 as `kernels.tree_attention` takes them, with
    its bounds max_shared_len and max_rows; logit_indices [n] int64 into the B tokens, None for all of them. A token of
    slot -1 is padding: it reads and writes no KV. Tokens after those of the last request are padding, too.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    page_tables: torch.Tensor
    query_start_loc: torch.Tensor
    shared_lens: torch.Tensor
    own_pages: torch.Tensor
    own_lens: torch.Tensor
    max_shared_len: int
    max_rows: int
    logit_indices: torch.Tensor | None


class PagedModel(Protocol):
    """A causal language model whose KV pages are the caller's to assign.

    tree_attention: whether `forward` takes a `TreeBatch`, too, and pages are copied by `copy_slots`, not `copy_pages`.
    dtype: of activations and KV. mask_token_id: stands for a draft that is not known yet, in a model that drafts in
    parallel; None in any other.
    """

    tree_attention: bool
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    dtype: torch.dtype
    device: torch.device
    mask_token_id: int | None

    def warm_up(self, sizes: Sequence[int]) -> int:
        """Capture forwards of a `ForwardBatch` of up to so many tokens; of how many sizes, 0 where none is replayed."""
        ...

    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        """Logits `[n, vocab]` at `batch.logit_indices`; KV of every token lands in its slot."""
        ...

    def copy_pages(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole pages; all sources are read before any destination is written."""

    def copy_slots(self, sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor) -> None:
        """Copy the first slots of pages to others; device tensors as `kernels.copy_pages` takes them."""
