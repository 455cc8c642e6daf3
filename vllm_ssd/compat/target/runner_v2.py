"""Hooks into vLLM's V2 model runner.

The runner passes device tensors to its speculator, but no requests. Six methods are wrapped so that our speculator sees
requests come and go, knows when the target is loaded, gets filler drafts rejected by vLLM's rejection sampler, and
knows which drafts vLLM counts. A seventh wrapper chooses CUDA graphs if the number of drafts adapts.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ssd.compat import patch
from vllm_ssd.compat.target.cache_salt import cache_salt_of
from vllm_ssd.compat.target.gain import can_gain, last_length
from vllm_ssd.compat.target.lora import note_drafts, repair_lora_rows
from vllm_ssd.compat.target.noise import noise_kind, noise_of
from vllm_ssd.compat.target.runner import DRAFTER_STATE, DrafterState, has_ssd
from vllm_ssd.compat.target.truncation import truncation_of
from vllm_ssd.link.protocol import UNKNOWN_NOISE, Noise, Truncation

CUDA_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager"


class V2Speculator(BaseSpeculator):
    """Base class of a V2 speculator that runs no model on the target's device.

    draft_logits [C, K, vocab] float32: log q times temperature of the drafts under verification, for the C lowest
    slots; while a sampled request is in a higher slot, all drafts of the batch are declared one-hot
    num_drafts [max_num_reqs] int32: number of valid drafts per slot; the rest are filler and rejected
    step: number of the scheduler step in progress
    drafter_state: state of the drafter at the last `speculate`
    noise_kind: kind of `Noise` of the target, once it is loaded
    """

    supports_mm_inputs = False
    draft_logits: torch.Tensor
    num_drafts: torch.Tensor
    step = 0
    drafter_state = DrafterState.IN_TIME
    noise_kind = UNKNOWN_NOISE
    _wanted: int | None = None
    _counts_valid = False  # whether vLLM counts only drafts that fit their grammars in this step
    _num_valid: Mapping[str, int] = MappingProxyType({})  # drafts that fit, by request with a grammar

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to capture: drafting is a lookup."""

    def capture(self) -> None:
        """Nothing to capture: drafting is a lookup."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Drafts [num_reqs, K] int64 for the next round; never reads a device tensor on the host."""
        num_reqs, num_drafts = input_batch.num_reqs, self.draft_logits.shape[1]
        if dummy_run:
            return num_sampled.new_zeros((num_reqs, num_drafts), dtype=torch.int64)
        wanted = num_drafts if num_speculative_tokens is None else num_speculative_tokens
        if wanted != self._wanted:
            self._wanted = wanted
            self.want(wanted)
        return self.speculate(input_batch, num_sampled, last_sampled, temperature, wanted)

    @abstractmethod
    def speculate(
        self, batch: Any, num_sampled: torch.Tensor, last_sampled: torch.Tensor, temperatures: torch.Tensor, wanted: int
    ) -> torch.Tensor:
        """Drafts [B, K] int64 after a round of vLLM's `InputBatch` `batch`.

        num_sampled [B] int32: tokens each row emitted, 0 in a prefill chunk; last_sampled [S, 1] int64, by slot: the
        last of them; temperatures [S] float32, by slot; wanted: drafts that the next round may carry.
        """

    @abstractmethod
    def want(self, num_drafts: int) -> None:
        """Set the number of drafts per round, from the next round on; called when it changes."""

    @abstractmethod
    def on_target_loaded(self) -> None:
        """Called once the target is loaded, before profiling."""

    @abstractmethod
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
        """A new or resumed request joins; token_ids: all its tokens so far, empty if it gets no drafts."""

    @abstractmethod
    def end_at(self, request_id: str, length: int) -> None:
        """The request ends at `length` committed tokens at the latest."""

    @abstractmethod
    def finish_requests(self, request_ids: Collection[str]) -> None:
        """Requests have ended; vLLM discards their results in flight. Unknown ones are ignored."""

    @abstractmethod
    def remove_request(self, request_id: str) -> None:
        """A request leaves its slot because it is preempted or replaced; unknown ones are ignored."""

    def begin_step(self, scheduler_output: Any) -> None:
        """Start the scheduler's next step; its finished requests leave first."""
        self.step += 1
        self._counts_valid = scheduler_output.pending_structured_output_tokens
        self.finish_requests(scheduler_output.finished_req_ids)

    def note_grammars(self, grammar_output: Any) -> None:
        """Note the step's `GrammarOutput`, if any; vLLM does not count drafts that do not fit their grammar."""
        self._num_valid = {}
        if self._counts_valid and grammar_output is not None:
            row_ids, num_valid = grammar_output.structured_output_request_ids, grammar_output.num_acceptable_drafts
            self._num_valid = dict(zip(row_ids, num_valid or ()))

    def num_scheduled_drafts(self, batch: Any) -> list[int]:
        """Number of drafts that vLLM counts in each row of `batch`, including filler."""
        if batch.num_draft_tokens_per_req is None:
            return [0] * batch.num_reqs
        num_drafts = batch.num_draft_tokens_per_req.tolist()
        if not self._num_valid:
            return num_drafts
        return [
            min(number, self._num_valid.get(request_id, number))
            for request_id, number in zip(batch.req_ids, num_drafts)
        ]

    def invalid_drafts(self, batch: Any) -> torch.Tensor:
        """Which logits rows of `batch` belong to filler, [num_logits] bool."""
        return batch.expanded_local_pos > self.num_drafts[batch.expanded_idx_mapping]


class LowestFirst(list[int]):
    """A list of free slots from which `pop` takes the lowest."""

    def __init__(self, slots: Iterable[int]) -> None:
        super().__init__(sorted(slots))  # a heap

    def pop(self, index: Any = -1) -> int:
        """Remove and return the lowest slot."""
        return heapq.heappop(self)

    def append(self, slot: int) -> None:
        """Return a slot."""
        heapq.heappush(self, slot)


def take_lowest_slots_first(req_states: Any) -> None:
    """Make vLLM's `RequestState` assign the lowest free slot instead of the highest."""
    req_states.free_indices = LowestFirst(req_states.free_indices)


def dense_token_bytes(vllm_config: VllmConfig) -> int:
    """Device memory in bytes in which vLLM keeps all requests' tokens for its n-gram drafter."""
    return 4 * vllm_config.scheduler_config.max_num_seqs * vllm_config.model_config.max_model_len


def ngram_speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> BaseSpeculator:
    """vLLM's own n-gram speculator on the device."""
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    return NgramGPUSpeculator(vllm_config, device, req_states)


def ngram_drafts(speculator: BaseSpeculator, batch: Any, num_sampled: torch.Tensor, req_states: Any) -> torch.Tensor:
    """n-gram drafts [B, K] int64 of `speculator`, the last token repeated where nothing matches."""
    nothing: dict[str, Any] = dict.fromkeys(("attn_metadata", "slot_mappings"))
    nothing |= dict.fromkeys(("last_hidden_states", "aux_hidden_states"))
    nothing |= dict.fromkeys(("num_rejected", "next_prefill_tokens", "temperature", "seeds"))
    return speculator.propose(batch, num_sampled=num_sampled, last_sampled=req_states.last_sampled_tokens, **nothing)


def install() -> None:
    """Wrap the V2 runner for speculators of ours; others behave as before. Idempotent."""
    runner = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
    judge = "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__call__"
    judged = ("logits", "input_batch", "draft_logits", "invalid_drafts")
    with patch.all_or_nothing():
        patch.wrap(f"{runner}.load_model", _has_our_speculator, _load_model)
        patch.wrap(f"{runner}.add_requests", _has_our_speculator, _add_requests, parameters=("scheduler_output",))
        patch.wrap(f"{runner}.finish_requests", _has_our_speculator, _finish_requests, parameters=("scheduler_output",))
        patch.wrap(f"{runner}.sample_tokens", _has_our_speculator, _sample_tokens, parameters=("grammar_output",))
        patch.wrap(f"{runner}._remove_request", _has_our_speculator, _remove_request, parameters=("req_id",))
        patch.wrap(judge, _judges_ours, _judge, parameters=judged)
        patch.wrap(f"{CUDA_GRAPHS}._init_candidates", _is_for_ssd, _init_candidates, parameters=())
        repair_lora_rows()


def _is_for_ssd(manager: Any) -> bool:
    return has_ssd(getattr(manager, "vllm_config", None))


def _init_candidates(original, manager):
    """Let every number of drafts use the next larger graph that was captured for it.

    For a number of tokens vLLM only considers graphs of the next captured size. If those are for another number of
    drafts, which happens as soon as there are several numbers, the batch would run without a graph.
    """
    original(manager)
    smaller: dict[tuple[Any, ...], int] = {}
    for graph in reversed(manager._capture_descs.get(CUDAGraphMode.FULL, ())):  # from the smallest on
        kind = graph.uniform_token_count, graph.num_active_loras, graph.num_ubatches
        for num_tokens in range(smaller.get(kind, 0) + 1, graph.num_tokens + 1):
            candidates = manager._candidates.setdefault((num_tokens, graph.num_active_loras), [])
            if graph not in candidates:
                candidates.insert(0, graph)
        smaller[kind] = graph.num_tokens


def _has_our_speculator(runner: Any, *args: Any, **kwargs: Any) -> bool:
    return isinstance(getattr(runner, "speculator", None), V2Speculator)


def _judges_ours(sampler: Any, *args: Any, **kwargs: Any) -> bool:
    return isinstance(getattr(sampler, "_ssd_speculator", None), V2Speculator)


def _load_model(original, runner, *args, **kwargs):
    original(runner, *args, **kwargs)
    runner.rejection_sampler._ssd_speculator = runner.speculator
    runner.speculator.noise_kind = noise_kind(runner)
    runner.speculator.on_target_loaded()


def _add_requests(original, runner, scheduler_output):
    original(runner, scheduler_output)
    for new in scheduler_output.scheduled_new_reqs:
        if new.req_id.startswith("_") and "warmup" in new.req_id:  # vLLM's own, for warm-up and graph capture
            continue
        slot = runner.req_states.req_id_to_index[new.req_id]
        gains, params = can_gain(new, runner.vllm_config), new.sampling_params
        tokens = new.prefill_token_ids if gains else ()
        noise = noise_of(runner, slot, runner.speculator.noise_kind)
        told = params.temperature, truncation_of(params), cache_salt_of(params), noise
        runner.speculator.add_request(new.req_id, slot, tokens, *told)
        if gains and (last := last_length(new)) is not None:
            runner.speculator.end_at(new.req_id, last)


def _finish_requests(original, runner, scheduler_output):
    runner.speculator.begin_step(scheduler_output)
    note_drafts(runner, scheduler_output)
    original(runner, scheduler_output)


def _sample_tokens(original, runner, grammar_output):
    """Attach the `DrafterState` to the round's result for the scheduler; see `scheduler.Adaptive`."""
    runner.speculator.note_grammars(grammar_output)
    state = runner.speculator.drafter_state  # as its drafts were looked up
    output = original(runner, grammar_output)
    result = getattr(output, "model_runner_output", output)
    if result is not None:
        setattr(result, DRAFTER_STATE, int(state))
    return output


def _remove_request(original, runner, req_id):
    runner.speculator.remove_request(req_id)
    return original(runner, req_id)


def _judge(original, sampler, logits, input_batch, draft_logits=None, invalid_drafts=None):
    slots = input_batch.idx_mapping_np
    beyond = slots >= sampler._ssd_speculator.draft_logits.shape[0]
    if beyond.any() and (sampler.sampler.sampling_states.temperature.np[slots[beyond]] > 0).any():
        draft_logits = None  # vLLM would read out of bounds; one-hot is lossless however the drafts were drawn
    invalid = sampler._ssd_speculator.invalid_drafts(input_batch)
    if invalid_drafts is not None:
        invalid = invalid | invalid_drafts
    return original(sampler, logits, input_batch, draft_logits, invalid)
