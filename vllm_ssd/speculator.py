"""The composition root on vLLM's V2 runner: drafts are looked up on the device, the host never waits for it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from vllm_ssd.cache import SpeculationCache
from vllm_ssd.compat.runner_v2 import V2Speculator, install, ngram_drafts, ngram_speculator
from vllm_ssd.courier import HIT, MISS, Courier
from vllm_ssd.kernels import Speculation
from vllm_ssd.proposer import logger, start_drafter, user_config


class SSDSpeculator(V2Speculator):
    """A speculator whose drafts were made elsewhere before it is asked for them.

    Tensor-parallel rank 0 has a drafter and looks up; the other ranks get drafts and their proposals by broadcast.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        install()
        config = user_config(vllm_config)
        num_slots = vllm_config.scheduler_config.max_num_seqs
        num_drafts = config.num_speculative_tokens
        vocab_size = vllm_config.model_config.get_vocab_size()
        top_m = min(config.top_m, vocab_size)
        # Allocated before vLLM measures how much memory is left for KV pages.
        self.draft_logits = torch.full((num_slots, num_drafts, vocab_size), -torch.inf, device=device)
        self.num_drafts = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._verifying = Speculation.empty(num_slots, num_drafts, top_m, device)
        self._req_states = req_states
        self._device = device
        self._group = get_tp_group()
        self._num_started = 0
        self._requests: dict[str, tuple[int, int]] = {}  # serial number and slot
        self._serials = np.full(num_slots, -1, np.int64)
        self._serials_on_device: torch.Tensor | None = None  # None: to be copied again
        self._sampled = np.zeros(num_slots, np.bool_)  # slots with a temperature over 0
        self._positions = torch.arange(num_drafts, device=device)
        self._ngram = ngram_speculator(vllm_config, device, req_states) if config.on_miss == "ngram" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._courier: Courier | None = None
        if config.on_miss == "wait":
            logger.warning("SSD: nothing waits for the drafter on vLLM's V2 runner; on_miss 'wait' acts like 'skip'")
        if self._group.rank_in_group == 0:
            self._cache = SpeculationCache(num_slots, config.max_branches, num_drafts, top_m, device)
            self._metrics, self._drafter = start_drafter(config, vllm_config)
            self._courier = Courier(config, self._drafter, self._metrics, self._cache, logger)
            weakref.finalize(self, self._courier.stop)

    def on_target_loaded(self) -> None:
        """Wait for the drafter, which has been loading beside the target."""
        if self._courier is not None:
            self._drafter.wait_until_ready()
            self._courier.run()

    def add_request(self, request_id: str, slot: int, token_ids: Sequence[int], temperature: float) -> None:
        """Give the request a serial number, and open it on the drafter while the target runs its prompt."""
        serial, self._num_started = self._num_started, self._num_started + 1
        self._requests[request_id] = serial, slot
        self._serials[slot] = serial
        self._serials_on_device = None
        self._sampled[slot] = temperature > 0
        if self._courier is not None:
            self._courier.start(serial, slot, token_ids, temperature)

    def remove_request(self, request_id: str) -> None:
        """Forget the request; its slot's blocks match no later one."""
        serial, slot = self._requests.pop(request_id, (-1, -1))
        if serial >= 0:
            self._sampled[slot] = False
            if self._courier is not None:
                self._courier.finish(serial)

    def want(self, num_drafts: int) -> None:
        """Let the drafter grow what rounds carry, and rest while they carry nothing."""
        if self._courier is not None:
            self._courier.want(num_drafts)

    def speculate(
        self, batch: Any, num_sampled: torch.Tensor, bonus: torch.Tensor, temperature: torch.Tensor, wanted: int
    ) -> torch.Tensor:
        """Drafts [B, K] int64: those of the outcome's branch, and the bonus token again where there is none."""
        slots = batch.idx_mapping
        sampled = bool(self._sampled[batch.idx_mapping_np].any())
        old = self._verifying[slots]
        if self._courier is None:
            present, found = torch.zeros_like(num_sampled), old
        else:
            present, found = self._cache.lookup(
                slots,
                self._serial_of_slot()[slots],
                (self._req_states.total_len.gpu[slots] - num_sampled).long(),
                num_sampled - 1,
                bonus.int(),
                old,
            )
        if self._group.world_size > 1:
            present, found = self._broadcast(present, found, sampled)
        usable = (num_sampled > 0) & ((temperature == 0) | (found.q_probs[:, 0, 0] > 0))
        num_drafts = torch.where(usable, found.num_drafts.clamp(max=wanted), 0)
        status = present.int() * torch.where(num_drafts > 0, HIT, MISS)
        token_ids, q_token_ids, q_probs = found.draft_token_ids, found.q_token_ids, found.q_probs
        if self._ngram is not None:
            unknown = num_drafts == 0
            matched = ngram_drafts(self._ngram, batch, num_sampled, self._req_states).int()
            token_ids = torch.where(unknown[:, None], matched, token_ids)
            q_token_ids = torch.where(unknown[:, None, None], matched[:, :, None], q_token_ids)
            q_probs = torch.where(unknown[:, None, None], 1.0, q_probs)
            num_drafts = torch.where(unknown & (num_sampled > 0), wanted, num_drafts)
        is_draft = self._positions < num_drafts[:, None]
        if sampled:
            self._write_draft_logits(slots, is_draft, q_token_ids, q_probs, temperature)
        token_ids = torch.where(is_draft, token_ids, bonus[:, None].int())
        self.num_drafts[slots] = num_drafts
        self._verifying.num_drafts[slots] = num_drafts
        self._verifying.draft_token_ids[slots] = token_ids
        if self._courier is not None and self._requests:
            columns = torch.stack((num_sampled, bonus.int(), status, num_drafts), 1)
            self._tell(self._serials[batch.idx_mapping_np].tolist(), torch.cat((columns, token_ids), 1))
        return token_ids.long()

    def _serial_of_slot(self) -> torch.Tensor:
        if self._serials_on_device is None:
            serials = torch.from_numpy(self._serials.copy())
            pinned = serials if self._stream is None else serials.pin_memory()
            self._serials_on_device = pinned.to(self._device, non_blocking=True)
        return self._serials_on_device

    def _broadcast(self, present: torch.Tensor, found: Speculation, sampled: bool) -> tuple[torch.Tensor, Speculation]:
        """Rank 0's findings on every rank; proposals travel only when a row of the batch needs them."""
        num_rows, num_drafts = found.draft_token_ids.shape
        parts = [present.int()[:, None], found.num_drafts[:, None], found.draft_token_ids]
        if sampled:
            parts += [found.q_token_ids.flatten(1), found.q_probs.flatten(1).view(torch.int32)]
        columns = self._group.broadcast(torch.cat(parts, 1), src=0)
        q_token_ids, q_probs = found.q_token_ids, found.q_probs
        if sampled:
            q_token_ids, q_probs = (
                q.reshape(found.q_probs.shape) for q in columns[:, 2 + num_drafts :].contiguous().chunk(2, 1)
            )
            q_probs = q_probs.contiguous().view(torch.float32)
        return columns[:, 0], Speculation(columns[:, 2 : 2 + num_drafts], q_token_ids, q_probs, columns[:, 1])

    def _write_draft_logits(
        self,
        slots: torch.Tensor,
        is_draft: torch.Tensor,
        q_token_ids: torch.Tensor,
        q_probs: torch.Tensor,
        temperature: torch.Tensor,
    ) -> None:
        """Temperature times log q of each draft [B, K, M], -inf elsewhere; vLLM divides by the temperature again."""
        num_drafts, vocab_size = self.draft_logits.shape[1:]
        rows = vocab_size * (slots[:, None] * num_drafts + self._positions)[:, :, None]
        logits = self.draft_logits.view(-1)
        logits.scatter_(0, (rows + self._verifying.q_token_ids[slots]).flatten(), -torch.inf)
        known = is_draft[:, :, None] & (q_probs > 0) & (temperature > 0)[:, None, None]
        values = torch.where(known, temperature[:, None, None] * q_probs.log(), -torch.inf)
        logits.scatter_(0, (rows + q_token_ids).flatten(), values.flatten())
        self._verifying.q_token_ids[slots] = q_token_ids
        self._verifying.q_probs[slots] = q_probs

    def _tell(self, serials: list[int], rows: torch.Tensor) -> None:
        """Let the courier have `rows` once the device has them."""
        if self._stream is None:
            self._courier.decided(serials, rows, None)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            pinned.copy_(rows, non_blocking=True)
            rows.record_stream(self._stream)
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        self._courier.decided(serials, pinned, copied)
