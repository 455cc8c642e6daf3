"""The interface between the drafter's engine and a draft model; does not import vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class UnsupportedDraftModel(ValueError):
    """Raised for a model that cannot draft with any attention backend."""


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
    """A causal language model whose KV pages are managed by the caller.

    tree_attention: whether `forward` also takes a `TreeBatch`, and pages are copied by `copy_slots`, not `copy_pages`;
    dtype: of activations and KV; mask_token_id: placeholder for unknown drafts in a parallel draft model, else None.
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
        """Capture forwards of `ForwardBatch`es with `sizes` tokens; returns the number of captured sizes."""
        ...

    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        """Logits `[n, vocab]` at `batch.logit_indices`; writes the KV of every token to its slot."""
        ...

    def copy_pages(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole pages; all sources are read before any destination is written."""

    def copy_slots(self, sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor) -> None:
        """Copy the first slots of pages; see `kernels.copy_pages`."""
