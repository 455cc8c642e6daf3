"""The speculator for vLLM's V2 runner: looks drafts up on the device, without the host waiting for it."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from vllm_ssd.compat.target.runner_v2 import (
    V2Speculator,
    dense_token_bytes,
    install,
    ngram_drafts,
    ngram_speculator,
    take_lowest_slots_first,
)
from vllm_ssd.kernels import DeviceSpeculation, lookup, write_draft_logits
from vllm_ssd.link.options import max_support
from vllm_ssd.link.protocol import Noise, Truncation
from vllm_ssd.target.start import logger, start_drafters, user_config
from vllm_ssd.target.v2.courier import Courier
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

MEMORY_BYTES = 950_000_000
"""Limit on the device memory for blocks, tokens and proposals together, unless `MIN_SAMPLED` requires more."""
MIN_SAMPLED = 64
"""Minimum number of concurrent requests with room for dense proposals of K * vocab_size * 4 bytes each."""


class SSDSpeculator(V2Speculator):
    """A speculator that looks up drafts which the drafter has already made.

    Tensor-parallel rank 0 has the drafter and does the lookup; the other ranks get drafts and proposals by broadcast.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        install()
        config = user_config(vllm_config)
        num_slots = vllm_config.scheduler_config.max_num_seqs
        num_drafts = config.num_speculative_tokens
        vocab_size = vllm_config.model_config.get_vocab_size()
        top_m = min(max_support(config.top_m, config.fan_out, config.max_branches), vocab_size)
        # Allocated before vLLM measures how much memory is left for KV pages.
        others = 2 * num_slots * config.max_branches * num_drafts * top_m * 8 + dense_token_bytes(vllm_config)
        row = num_drafts * vocab_size * 4
        num_sampled = min(num_slots, max(MIN_SAMPLED, (MEMORY_BYTES - others) // row))
        self.draft_logits = torch.full((num_sampled, num_drafts, vocab_size), -torch.inf, device=device)
        self._columns = torch.zeros(
            num_sampled, num_drafts, top_m, dtype=torch.int32, device=device
        )  # token ids that are set in `draft_logits`
        take_lowest_slots_first(req_states)
        self._verifying = DeviceSpeculation.empty(num_slots, num_drafts, top_m, device)
        self.num_drafts = self._verifying.num_drafts
        self._drafts = torch.zeros(num_slots, 1 + num_drafts, dtype=torch.int64, device=device)  # of the last batch
        self._req_states = req_states
        self._device = device
        self._group = get_tp_group()
        self._num_started = 0
        self._requests: dict[str, tuple[int, int]] = {}  # serial number and slot
        self._serials = np.full(num_slots, -1, np.int64)
        self._serials_on_device = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        self._sampled = np.zeros(num_slots, np.bool_)  # slots with a temperature over 0
        self._courier: Courier | None = None
        if config.on_miss == "wait":
            logger.warning("SSD: nothing waits for the drafter on vLLM's V2 runner; on_miss 'wait' acts like 'skip'")
        if self._group.rank_in_group == 0:
            logger.info(
                "SSD: about %.2f GB of the target's device hold blocks, tokens and the proposals of up to %d of %d "
                "requests; with more requests than that, sampled drafts are verified as one-hot",
                (others + num_sampled * row) / 1e9,
                num_sampled,
                num_slots,
            )
            self._cache = SpeculationCache(num_slots, config.max_branches, num_drafts, top_m, device)
            self._metrics, self._drafters = start_drafters(config, vllm_config)
            self._courier = Courier(
                config, self._drafters, self._metrics, self._cache, logger, vllm_config.max_concurrent_batches
            )
            self._ngram = ngram_speculator(vllm_config, device, req_states) if self._courier.wants_ngram else None
            weakref.finalize(self, self._courier.stop)

    def on_target_loaded(self) -> None:
        """Compile the kernels, and wait for the drafter, which has been loading in parallel."""
        self._warm_up()
        if self._courier is not None:
            self._drafters.wait_until_ready()
            self._courier.run()

    def add_request(
        self,
        request_id: str,
        slot: int,
        token_ids: Sequence[int],
        temperature: float,
        truncation: Truncation,
        cache_salt: bytes,
        noise: Noise,
    ) -> None:
        """Give the request a serial number, and open it on the drafter while the target prefills it."""
        serial, self._num_started = self._num_started, self._num_started + 1
        self._requests[request_id] = serial, slot
        self._serials[slot] = serial
        self._serials_on_device[slot].fill_(serial)  # in stream order: earlier steps still see the previous request
        self._sampled[slot] = temperature > 0
        if self._courier is not None and token_ids:
            self._courier.start(serial, slot, token_ids, temperature, truncation, cache_salt, noise)

    def end_at(self, request_id: str, length: int) -> None:
        """Note the request's final length, so that the drafter stops when its last round begins."""
        if self._courier is not None:
            self._courier.end_at(self._requests[request_id][0], length)

    def finish_requests(self, request_ids: Collection[str]) -> None:
        """Forget the requests; the blocks in their slots match no later request."""
        serials = [serial for request_id in request_ids if (serial := self._forget(request_id)) is not None]
        if self._courier is not None and serials:
            self._courier.finish(self.step, serials)

    def remove_request(self, request_id: str) -> None:
        """Forget a preempted request, whose results in flight still count; unknown ones are ignored."""
        serial = self._forget(request_id)
        if self._courier is not None and serial is not None:
            self._courier.preempt(self.step, serial)

    def _forget(self, request_id: str) -> int | None:
        """Forget a request and return its serial number; None if it is unknown."""
        serial, slot = self._requests.pop(request_id, (None, -1))
        if serial is not None:
            self._sampled[slot] = False
        return serial

    def want(self, num_drafts: int) -> None:
        """Have the drafter grow `num_drafts` drafts per round; it idles while that is 0."""
        if self._courier is not None:
            self._courier.want(num_drafts)

    def speculate(
        self, batch: Any, num_sampled: torch.Tensor, last_sampled: torch.Tensor, temperatures: torch.Tensor, wanted: int
    ) -> torch.Tensor:
        """Drafts [B, K] int64: those of the outcome's branch, or filler (the last token repeated)."""
        slots, slots_on_host = batch.idx_mapping, batch.idx_mapping_np
        courier = self._courier
        if courier is not None:
            ngram, outcomes = None, courier.outcome_buffer()
            if self._ngram is not None and courier.wants_ngram and wanted:
                ngram = ngram_drafts(self._ngram, batch, num_sampled, self._req_states)
            lookup(
                self._cache.blocks,
                self._verifying,
                slots,
                num_sampled,
                self._serials_on_device,
                self._req_states.total_len.gpu,
                last_sampled,
                temperatures,
                wanted,
                self._drafts,
                outcomes.rows,
                ngram,
            )
        sampled = bool(self._sampled[slots_on_host].any())
        if self._group.world_size > 1:
            self._broadcast(slots, sampled)
        if sampled:
            write_draft_logits(self.draft_logits, self._columns, self._verifying, slots, temperatures)
        if courier is not None:
            serials, num_scheduled = self._serials[slots_on_host].tolist(), self.num_scheduled_drafts(batch)
            courier.await_outcomes(self.step, serials, num_scheduled, outcomes)
            self.drafter_state = courier.drafter_state
        return self._drafts[: batch.num_reqs, 1:]

    def _broadcast(self, slots: torch.Tensor, sampled: bool) -> None:
        """Broadcast rank 0's drafts to every rank, and the proposals if any row of the batch samples."""
        drafts = self._group.broadcast(self._drafts[: len(slots)], src=0)
        self.num_drafts[slots] = drafts[:, 0].int()
        if sampled:
            q_token_ids, q_probs = self._verifying.q_token_ids, self._verifying.q_probs
            q = self._group.broadcast(torch.stack((q_token_ids[slots], q_probs[slots].view(torch.int32))), src=0)
            q_token_ids[slots], q_probs[slots] = q[0], q[1].view(torch.float32)

    def _warm_up(self) -> None:
        """Launch everything once for a row that emitted nothing, so that no request waits for compilers."""
        slots = np.zeros(1, np.int64)
        on_device = torch.from_numpy(slots).to(self._device)
        batch = SimpleNamespace(num_reqs=1, idx_mapping=on_device, idx_mapping_np=slots, num_draft_tokens_per_req=None)
        num_sampled = torch.zeros(1, dtype=torch.int32, device=self._device)
        temperatures = torch.zeros(len(self.num_drafts), device=self._device)
        self._sampled[0] = True
        for wanted in (self._drafts.shape[1] - 1, 0):  # compiles the variants with and without n-gram drafts
            self.speculate(batch, num_sampled, self._req_states.last_sampled_tokens, temperatures, wanted)
        self._sampled[0] = False
