"""The composition root: what vLLM's worker constructs for speculative method "ssd"."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.tokenizers import get_tokenizer

from vllm_ssd.compat import runner_v1
from vllm_ssd.config import RUNTIME_ENV, SERVER_PID_ENV, SSDConfig
from vllm_ssd.launch import DrafterProcess
from vllm_ssd.metrics import Metrics
from vllm_ssd.placement import place_drafter
from vllm_ssd.protocol import PROTOCOL_VERSION, Hello, fingerprint
from vllm_ssd.sessions import Proposal
from vllm_ssd.verifier import Verifier

logger = init_logger("vllm.vllm_ssd")


class SSDProposer:
    """A vLLM `custom_class` proposer: the verifier on tensor-parallel rank 0, a bystander on the others."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        runner_v1.install(SSDProposer)
        self._verifier: Verifier | None = None
        self._request_ids: Sequence[str] = ()
        self._num_verified: Sequence[int] = ()
        if get_tp_group().rank_in_group != 0:
            return
        config = user_config(vllm_config)
        self._metrics, self._drafter = start_drafter(config, vllm_config)
        self._verifier = Verifier(config, self._drafter, self._metrics)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Called once the target is loaded: wait for the drafter, which has been loading beside it."""
        if self._verifier is not None:
            self._drafter.wait_until_ready()

    def on_schedule(
        self, started: Sequence[tuple[str, Sequence[int] | None, float, int]], finished: Sequence[str]
    ) -> None:
        """Requests that join or leave, before the target's forward."""
        if self._verifier is not None:
            self._verifier.finish_requests(finished)
            self._verifier.start_requests(request for request in started if request[1])

    def on_rows(self, request_ids: Sequence[str], num_verified: Sequence[int]) -> None:
        """The requests whose rows the next `propose` gets, and how many drafts of each were verified."""
        self._request_ids, self._num_verified = request_ids, num_verified

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for each row; see `Verifier.propose`."""
        if self._verifier is None:
            return [[] for _ in sampled_token_ids]
        return self._verifier.propose(
            self._request_ids, self._num_verified, sampled_token_ids, num_tokens_no_spec, token_ids_cpu
        )

    def proposals(
        self, request_ids: Sequence[str], num_tokens: Sequence[int], draft_token_ids: list[list[int]]
    ) -> list[list[Proposal | None]] | None:
        """The distributions of the drafts under verification; see `Verifier.proposals`."""
        return self._verifier.proposals(request_ids, num_tokens, draft_token_ids)


def user_config(vllm_config: VllmConfig) -> SSDConfig:
    """What the user asked for, as it travelled to this worker."""
    config = SSDConfig.from_json(vllm_config.additional_config["ssd"])
    return config.with_runtime(os.environ.get(RUNTIME_ENV, "{}"))


def start_drafter(config: SSDConfig, vllm_config: VllmConfig) -> tuple[Metrics, DrafterProcess]:
    """Start a drafter for this worker, which loads beside the target, and the counters about it."""
    metrics = Metrics(config.num_speculative_tokens, logger)
    if config.metrics_port is not None:
        metrics.serve(config.metrics_port + vllm_config.parallel_config.data_parallel_index)
    options, environment = place_drafter(config, vllm_config, is_cpu=current_platform.is_cpu())
    drafter = DrafterProcess(
        options,
        _hello(config, vllm_config),
        environment=environment,
        startup_timeout_s=config.startup_timeout_s,
        logger=logger,
        server_pid=int(os.environ.get(SERVER_PID_ENV, "0")),
    )
    return metrics, drafter


def _hello(config: SSDConfig, vllm_config: VllmConfig) -> Hello:
    model = vllm_config.model_config
    tokenizer = ""
    if not model.skip_tokenizer_init:
        tokenizer = fingerprint(
            get_tokenizer(
                model.tokenizer, trust_remote_code=model.trust_remote_code, revision=model.tokenizer_revision
            ).get_vocab()
        )
    return Hello(PROTOCOL_VERSION, model.get_vocab_size(), config.num_speculative_tokens, tokenizer)
