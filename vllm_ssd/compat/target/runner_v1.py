"""Hooks into vLLM's V1 model runner.

vLLM passes sampled tokens to a `custom_class` proposer, but no request ids, and never asks for proposal distributions.
Five methods of the runner are wrapped so that our proposer sees requests come and go, knows which requests its rows
belong to, supplies the q of exactly the drafts that are verified, and costs nothing in steps without drafts.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_ssd.compat import patch
from vllm_ssd.compat.target.cache_salt import cache_salt_of
from vllm_ssd.compat.target.gain import can_gain, ending_requests
from vllm_ssd.compat.target.seeded_rounds import SeededRounds
from vllm_ssd.compat.target.thinking_budget import ThinkingBudget
from vllm_ssd.compat.target.truncation import truncation_of
from vllm_ssd.compat.target.weights import warn_of_new_weights
from vllm_ssd.link.protocol import Noise, Proposal, Truncation

EXPAND = "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens"


class StartedRequest(NamedTuple):
    """A request that joins; token_ids: of its prompt, None if it has embeddings instead."""

    request_id: str
    token_ids: Sequence[int] | None
    temperature: float
    min_tokens: int
    truncation: Truncation
    cache_salt: bytes
    noise: Noise


class V1Proposer(Protocol):
    """What the wrapped runner calls on our proposer, in addition to vLLM's own `propose`."""

    seeded_rounds: SeededRounds

    def on_schedule(
        self,
        started: Sequence[StartedRequest],
        finished: Sequence[str],
    ) -> None:
        """Note requests that join or leave, before the forward.

        Requests that cannot gain from drafts never join, and those with one token left leave early.
        """

    def on_rows(self, request_ids: Sequence[str], num_verified: Sequence[int]) -> None:
        """Note the requests in the rows of the next `propose`, and how many drafts of each were verified."""

    def proposals(
        self, request_ids: Sequence[str], num_tokens: Sequence[int], draft_token_ids: list[list[int]]
    ) -> list[list[Proposal | None]] | None:
        """The distribution that each draft under verification was drawn from; None if all are one-hot."""


_proposers: tuple[type, ...] = ()


def install(proposer_class: type) -> None:
    """Wrap the V1 runner for proposers of `proposer_class`; other methods behave as before. Idempotent."""
    global _proposers
    if proposer_class not in _proposers:
        _proposers += (proposer_class,)
    with patch.all_or_nothing():
        _wrap("execute_model", _execute_model, "scheduler_output")
        _wrap("propose_draft_token_ids", _propose_draft_token_ids, "scheduler_output")
        _wrap("_sample", _sample, "logits", "spec_decode_metadata")
        _wrap("_input_fits_in_drafter", _input_fits_in_drafter, "common_attn_metadata")
        _wrap("_get_spec_decode_draft_probs", _get_spec_decode_draft_probs, "spec_decode_metadata")
        warn_of_new_weights()
        repair_cpu_sampling()


def repair_cpu_sampling() -> None:
    """Fix vLLM's rejection sampler on the CPU, which reads uninitialised memory for temperature, top-k and top-p.

    The fix applies to every engine in this process. Idempotent.
    """
    if current_platform.is_cpu() and not expand_is_correct(patch.original(EXPAND)):
        parameters = ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to")
        patch.replace(EXPAND, expand_batch_to_tokens, parameters=parameters)
        _connect_cpu_kernels()


def _is_ours(runner: Any, *args: Any, **kwargs: Any) -> bool:
    return isinstance(getattr(runner, "drafter", None), _proposers)


def _wrap(name: str, body: Callable[..., Any], *parameters: str) -> None:
    """Wrap a method of the runner by `body(bound original, runner, proposer, ...)`."""

    def wrapper(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
        return body(functools.partial(original, runner), runner, runner.drafter, *args, **kwargs)

    patch.wrap(f"vllm.v1.worker.gpu_model_runner:GPUModelRunner.{name}", _is_ours, wrapper, parameters=parameters)


def _execute_model(original, runner, proposer: V1Proposer, scheduler_output, *args, **kwargs):
    rounds = proposer.seeded_rounds
    started = [
        StartedRequest(
            new.req_id,
            new.prompt_token_ids,
            new.sampling_params.temperature,
            new.sampling_params.min_tokens,
            truncation_of(new.sampling_params),
            cache_salt_of(new.sampling_params),
            rounds.start(runner, new.req_id, new.sampling_params),
        )
        for new in scheduler_output.scheduled_new_reqs
        if can_gain(new, runner.vllm_config)
    ]
    if started or scheduler_output.finished_req_ids:
        rounds.finish(scheduler_output.finished_req_ids)
        proposer.on_schedule(started, list(scheduler_output.finished_req_ids))
    return original(scheduler_output, *args, **kwargs)


def _propose_draft_token_ids(original, runner, proposer: V1Proposer, scheduler_output, *args, **kwargs):
    verified = scheduler_output.scheduled_spec_decode_tokens
    request_ids = runner.input_batch.req_ids
    if ending := ending_requests(runner, request_ids):
        proposer.on_schedule((), ending)
    proposer.on_rows(request_ids, [len(verified.get(request_id, ())) for request_id in request_ids])
    return original(scheduler_output, *args, **kwargs)


def _sample(original, runner, proposer: V1Proposer, logits, spec_decode_metadata):
    """Sample rounds without any drafts with the plain sampler.

    vLLM's rejection sampler does the same, but is slower, and on the CPU it crashes in 0.29 to 0.33 if a request sets
    top_k but not top_p. `predict_bonus_token` must be set: with speculation on, the thinking budget otherwise counts
    only draft rows, and forces the end marker in a wrong row. vLLM 0.30 and 0.31 do not set it themselves.
    """
    batch = runner.input_batch
    metadata = batch.sampling_metadata
    ThinkingBudget.take_over(batch.thinking_budget_state_holder)
    with proposer.seeded_rounds.seeded(batch):
        if spec_decode_metadata is not None and any(spec_decode_metadata.num_draft_tokens):
            if not metadata.logprob_token_ids:
                return original(logits, spec_decode_metadata)
            logits, metadata = without_drafts(logits, metadata, spec_decode_metadata)
        batch.update_async_output_token_ids()
        return runner.sampler(logits=logits, sampling_metadata=metadata, predict_bonus_token=True)


def without_drafts(
    logits: torch.Tensor, metadata: SamplingMetadata, spec_decode_metadata: SpecDecodeMetadata
) -> tuple[torch.Tensor, SamplingMetadata]:
    """Reduce a round to its first token: the first row of `logits` of each request, [B, vocab], and no drafts.

    Used for batches with `logprob_token_ids`, with which vLLM's rejection sampler loses logprobs or raises.
    """
    num_drafts = torch.tensor(spec_decode_metadata.num_draft_tokens, device=logits.device)
    first = spec_decode_metadata.bonus_logits_indices - num_drafts
    no_drafts: list[list[int]] = [[] for _ in spec_decode_metadata.num_draft_tokens]
    return logits[first], dataclasses.replace(metadata, spec_token_ids=no_drafts)


def _input_fits_in_drafter(original, runner, proposer: V1Proposer, common_attn_metadata):
    """Ask for drafts even if a row is within K tokens of `max_model_len`.

    vLLM would verify zeros for every row of the batch, because a drafter of its own would write KV beyond the limit.
    Ours does not, and the scheduler truncates the drafts of that row.
    """
    return common_attn_metadata is not None


def _get_spec_decode_draft_probs(original, runner, proposer: V1Proposer, spec_decode_metadata):
    """Dense q `[num draft tokens, vocab]` float32 for exactly the drafts under verification.

    Drafts without a known distribution get a one-hot row, which is lossless however they were drawn; rows of greedy
    requests are not read. With tensor parallelism, rank 0 broadcasts the distributions.
    """
    batch = runner.input_batch
    if batch.sampling_metadata.all_greedy:
        return None
    # Use the host's lists: reading their copy on the device would wait for the forward.
    drafts = [list(row) for row in batch.spec_token_ids[: len(spec_decode_metadata.num_draft_tokens)]]
    group = get_tp_group()
    rows = None
    if group.rank_in_group == 0:
        rows = proposer.proposals(batch.req_ids, batch.num_tokens_no_spec[: len(drafts)].tolist(), drafts)
    if group.world_size > 1:
        rows = group.broadcast_object(rows, src=0)
    if rows is None:
        return None
    return dense_proposals(
        [draft for row in drafts for draft in row],
        [p for row in rows for p in row],
        batch.vocab_size,
        spec_decode_metadata.draft_token_ids.device,
    )


def dense_proposals(
    drafts: list[int], proposals: list[Proposal | None], vocab_size: int, device: torch.device
) -> torch.Tensor:
    """q `[n, vocab_size]` float32; one-hot at the draft where its proposal is None.

    Only ids and probabilities are copied to the device, from pinned memory for a GPU.
    """
    one = np.ones(1, np.float32)
    ids = [np.array([draft], np.int32) if p is None else p[0] for draft, p in zip(drafts, proposals)]
    probs = np.concatenate([one if p is None else p[1] for p in proposals])
    rows = np.repeat(np.arange(len(drafts)), [len(i) for i in ids])
    places = rows * vocab_size + np.concatenate(ids)
    known = probs > 0  # entries without probability may repeat a token
    q = torch.zeros(len(drafts), vocab_size, device=device)
    q.view(-1).index_copy_(0, _to_device(places[known], device), _to_device(probs[known], device))
    return q


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Repeat `x` [batch] for each token of its row -> [num_tokens]; `replace_from` becomes `replace_to`.

    Replaces vLLM's function of this name on the CPU, which in 0.29 to 0.33 returns uninitialised memory unless `x` is
    int64, because it fills a copy.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts.long(), output_size=num_tokens)


def expand_is_correct(expand: Callable[..., torch.Tensor]) -> bool:
    """Whether vLLM's own `expand_batch_to_tokens` works here; called once at startup.

    Each try expects different values, so that memory left over from an earlier one cannot pass.
    """
    cumulative = torch.tensor([2, 3, 6], dtype=torch.int32)
    for shift, dtype in enumerate((torch.float32, torch.int32)):
        x = torch.tensor([30 + shift, 0, 50 + shift], dtype=dtype)
        try:
            found = expand(x, cumulative, 6, 0, 70 + shift)
        except Exception:  # 0.30 cannot even launch it; use ours after any error
            return False
        if found.tolist() != [30 + shift] * 2 + [70 + shift] + [50 + shift] * 3:
            return False
    return True


def _connect_cpu_kernels() -> None:
    """Connect the sampler's dispatchers to the CPU kernels, which vLLM 0.30 stores under names that are not read."""
    from vllm.utils import cpu_triton_utils

    for name in ("rejection_greedy_sample", "rejection_random_sample", "expand", "sample_recovered_tokens"):
        dispatcher = getattr(rejection_sampler, f"_{name}", None)
        kernel = getattr(cpu_triton_utils, f"{name}_kernel", None)
        # Without Triton, the kernel is a placeholder: the bare function, which cannot be launched.
        if kernel is not None and isinstance(getattr(dispatcher, "kernel", None), types.FunctionType):
            patch.replace(f"{rejection_sampler.__name__}:_{name}.kernel", kernel)
