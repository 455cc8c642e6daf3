"""Captured forwards with vLLM's attention, in which every token is a sequence with its own page table."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_ssd.compat.drafter.graphs import Graphs, Replay
from vllm_ssd.compat.drafter.paged import ForwardBatch

MAX_QUERY = 16
"""Most tokens of one sequence in a captured forward, enough after a miss; a prompt would read its KV too often."""

Groups = Sequence[tuple[list[str], AttentionMetadataBuilder]]
"""Layer names, and the builder of these layers' attention metadata."""
Forward = Callable[[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps attention metadata, token ids, positions and slots to hidden states."""


def metadata_by_layer(groups: Groups, build: Callable[[AttentionMetadataBuilder], Any]) -> dict[str, Any]:
    """Build each group's attention metadata with `build` and return it by layer name."""
    found: dict[str, Any] = {}
    for names, builder in groups:
        found |= dict.fromkeys(names, build(builder))
    return found


class DecodeGraphs:
    """CUDA graphs for batches of up to `sizes[-1]` tokens, over buffers with fixed addresses.

    Several tokens of a sequence are passed as sequences of one token each: a token can read its predecessors in the
    same batch from the pages, since KV is written before attention reads it. Padding reads page 0 and writes nothing.
    """

    def __init__(
        self,
        forward: Forward,
        groups: Groups,
        sizes: Sequence[int],
        hidden_size: int,
        dtype: torch.dtype,
        page_size: int,
        max_model_len: int,
        graphs: Graphs,
    ) -> None:
        self._forward, self._groups, self._graphs = forward, groups, graphs
        self._sizes, self._max_model_len = list(sizes), max_model_len
        self._replays: dict[int, Replay] = {}
        self._metadata: dict[str, Any] = {}
        most, device = self._sizes[-1], groups[0][1].device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._token_ids, self._seq_lens = zeros(most), zeros(most) + 1
        self._positions, self._slots = zeros(most, dtype=torch.int64), zeros(most, dtype=torch.int64) - 1
        self._page_tables = zeros(most, max_model_len // page_size + 3)
        self._starts_cpu = torch.arange(most + 1, dtype=torch.int32)
        self._starts = self._starts_cpu.to(device)
        self._hidden_states = zeros(most, hidden_size, dtype=dtype)

    def capture(self) -> int:
        """Capture every size, the largest first; returns the number of sizes."""
        for size in reversed(self._sizes):
            self._replays[size] = self._graphs.capture(self._step_of(size))
        return len(self._sizes)

    def _step_of(self, size: int) -> Callable[[], None]:
        seq_lens = torch.ones(size, dtype=torch.int32)
        batch = self._batch(size, seq_lens, self._max_model_len)
        self._metadata = metadata_by_layer(self._groups, lambda builder: builder.build_for_cudagraph_capture(batch))

        def step() -> None:
            hidden_states = self._forward(
                self._metadata, self._token_ids[:size], self._positions[:size], self._slots[:size]
            )
            self._hidden_states[:size].copy_(hidden_states)

        return step

    @torch.inference_mode()
    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Hidden states `[T, hidden_size]` of a batch, valid until the next call; None if no graph fits it."""
        num_tokens, query_lens = len(batch.token_ids), np.diff(batch.query_start_loc)
        at = bisect.bisect_left(self._sizes, num_tokens)
        if at == len(self._sizes) or query_lens.max() > MAX_QUERY:
            return None
        size = self._sizes[at]
        seq_lens = np.ones(size, np.int32)
        seq_lens[:num_tokens] = batch.positions + 1
        self._fill(self._token_ids, batch.token_ids)
        self._fill(self._positions, batch.positions)
        self._fill(self._slots, batch.slots)
        self._slots[num_tokens:size] = -1
        self._fill(self._seq_lens, seq_lens)
        page_tables = np.repeat(batch.page_tables, query_lens, axis=0)
        self._fill(self._page_tables[:, : page_tables.shape[1]], page_tables)
        self._page_tables[num_tokens:size, 0] = 0
        common = self._batch(size, torch.from_numpy(seq_lens), int(seq_lens.max()))
        self._metadata = metadata_by_layer(self._groups, lambda builder: builder.build(0, common))
        self._replays[size]()
        return self._hidden_states[:num_tokens]

    def _batch(self, size: int, seq_lens: torch.Tensor, max_seq_len: int) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self._starts[: size + 1],
            query_start_loc_cpu=self._starts_cpu[: size + 1],
            seq_lens=self._seq_lens[:size],
            num_reqs=size,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=max_seq_len,
            block_table_tensor=self._page_tables[:size],
            slot_mapping=self._slots[:size],
            positions=self._positions[:size],
            seq_lens_cpu_upper_bound=seq_lens,
        )

    def _fill(self, buffer: torch.Tensor, values: np.ndarray) -> None:
        host = torch.from_numpy(np.ascontiguousarray(values))
        buffer[: len(values)].copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)


def capturing_builders(groups: Groups, vllm_config: VllmConfig, sizes: Sequence[int]) -> Groups | None:
    """Builders like those of `groups` for graphs of up to `sizes[-1]` sequences; None if one does not support graphs.

    New builders are needed because vLLM sizes their buffers for its own graphs, which a drafter does not have, and for
    its number of requests, each of which has many branches here.
    """
    widened, scheduler = copy.copy(vllm_config), copy.copy(vllm_config.scheduler_config)
    compilation = copy.copy(vllm_config.compilation_config)
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    compilation.cudagraph_capture_sizes = list(sizes)
    compilation.max_cudagraph_capture_size = sizes[-1]
    scheduler.max_num_seqs = max(scheduler.max_num_seqs, sizes[-1])
    widened.compilation_config, widened.scheduler_config = compilation, scheduler
    found = []
    for names, builder in groups:
        kind, spec = type(builder), builder.kv_cache_spec
        if kind.get_cudagraph_support(widened, spec) == AttentionCGSupport.NEVER:
            return None
        found.append((names, kind(spec, builder.layer_names, widened, builder.device)))
    return found
