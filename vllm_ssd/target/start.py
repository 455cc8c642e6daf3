"""Start the drafter of one vLLM worker, on either model runner."""

from __future__ import annotations

import os

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.tokenizers import get_tokenizer

from vllm_ssd.config import SERVER_PID_ENV, SSDConfig
from vllm_ssd.link.placement import place_drafter
from vllm_ssd.link.process import DrafterProcess
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Hello, fingerprint
from vllm_ssd.target.metrics import Metrics

logger = init_logger("vllm.vllm_ssd")


def user_config(vllm_config: VllmConfig) -> SSDConfig:
    """What the user asked for, as it travelled to this worker."""
    ours = vllm_config.additional_config
    assert isinstance(ours, dict)  # see `has_ssd`
    return SSDConfig.from_json(ours["ssd"])


def start_drafter(config: SSDConfig, vllm_config: VllmConfig) -> tuple[Metrics, DrafterProcess]:
    """Start a drafter for this worker, which loads beside the target, and the counters about it.

    The metrics' port is free again when the drafter is closed or the server has ended.
    """
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
        on_stats=metrics.drafter,
        on_end=metrics.close,
    )
    metrics.watch(drafter)
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
