"""The plugin's entry point, and the translation of a user's configuration into vLLM's."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ssd.config import SSDConfig

logger = logging.getLogger("vllm.vllm_ssd")

PROPOSER = "vllm_ssd.target.v1.proposer.SSDProposer"
PIPELINE_EXTENSION = "vllm_ssd.compat.target.pipeline.WorkerExtension"
_failed = False


def register() -> None:
    """Teach vLLM the speculative method "ssd".

    vLLM calls this unguarded in every process, also for users who never use ssd. So it is idempotent, never raises, and
    leaves vLLM unchanged if it fails; a user who then asks for ssd gets an error with the reason.
    """
    global _failed
    if _failed:
        return
    try:
        from vllm_ssd.compat import patch
        from vllm_ssd.compat.target import batches, cache_salt, configuration, runner

        with patch.all_or_nothing():
            batches.run_one_batch_at_a_time()
            runner.install_speculator(build_speculator)
            cache_salt.carry_where_loaded()
            configuration.install(translate)
    except Exception as error:
        _failed = True
        logger.exception("vllm-ssd could not register; speculative method 'ssd' is not available")
        with contextlib.suppress(Exception):
            from vllm_ssd.compat.target import configuration

            configuration.refuse(error)


def build_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
    """Build the V2 runner's speculator."""
    from vllm_ssd.compat.target.weights import warn_of_new_weights
    from vllm_ssd.target.v2.speculator import SSDSpeculator

    warn_of_new_weights()
    return SSDSpeculator(vllm_config, device, req_states)


def translate(engine_args: Any, model_config: Any, parallel_config: Any) -> None:
    """Validate the user's ssd configuration and rewrite `engine_args` so that vLLM carries it to its workers.

    `speculative_config` becomes one of vLLM's own methods: "custom_class" on the V1 runner, METHOD_ON_V2 on the V2
    runner. Keys that change the target's forward travel in `additional_config["ssd"]`, which is part of vLLM's
    compile-cache key; all others travel in an environment variable, which is not.
    """
    import vllm

    from vllm_ssd.compat.target import runner, unsupported
    from vllm_ssd.compat.version import check_vllm_version
    from vllm_ssd.config import METRICS_ENV, REPLICAS_ENV, RUNTIME_ENV, SERVER_PID_ENV, SSDConfig
    from vllm_ssd.link.metrics_socket import show_workers

    check_vllm_version(vllm.__version__)
    if model_config.runner_type == "pooling":
        raise ValueError("ssd: the target is a pooling model, which generates no tokens")
    unsupported.check_target(model_config)
    user = dict(engine_args.speculative_config or {})
    for field, key in (("spec_method", "method"), ("spec_model", "model"), ("spec_tokens", "num_speculative_tokens")):
        value = getattr(engine_args, field, None)
        if value is not None:
            if key in user:
                raise ValueError(f"ssd: {key} is given twice, in speculative_config and as {field}")
            user[key] = value
            setattr(engine_args, field, None)
    config = SSDConfig.from_user(user)
    config = settle_drafter(config, engine_args, model_config)
    engine_args.additional_config = {**(engine_args.additional_config or {}), "ssd": config.to_json()}
    os.environ[RUNTIME_ENV] = config.runtime_json()
    os.environ[SERVER_PID_ENV] = str(os.getpid())
    os.environ[REPLICAS_ENV] = str(replicas_here(parallel_config))
    os.environ[METRICS_ENV] = show_workers(range(parallel_config.data_parallel_size))
    if parallel_config.pipeline_parallel_size > 1 and not runner.is_v2():
        if parallel_config.worker_extension_cls not in ("", PIPELINE_EXTENSION):
            raise ValueError("ssd: pipeline parallelism needs worker_extension_cls, which is set already")
        parallel_config.worker_extension_cls = PIPELINE_EXTENSION
    if runner.is_v2():
        disguise = on_v2(config, engine_args, parallel_config)
    else:
        disguise = {"method": "custom_class", "model": PROPOSER}
    engine_args.speculative_config = disguise | {"num_speculative_tokens": config.num_speculative_tokens}


def settle_drafter(config: SSDConfig, engine_args: Any, model_config: Any) -> SSDConfig:
    """Complete `config` with what the draft model inherits from the target, and expand `~` in paths.

    Raises ValueError for a local model path that does not exist and for unknown names in drafter_args.
    """
    from vllm_ssd.compat.target import configuration
    from vllm_ssd.link.drafter_args import check_names, has_no_tokenizer, inherited_scaling, overridden_positions

    paths = {name: getattr(config, name) for name in ("model", "tokenizer", "download_dir")}
    config = replace(config, **{name: path and os.path.expanduser(path) for name, path in paths.items()})
    if config.model.startswith(("/", "./", "../", "~")) and not os.path.exists(config.model):
        raise ValueError(f"ssd: model {config.model!r} is neither a folder nor the name of a model on the Hub")
    drafter_args = config.drafter_args or {}
    check_names(drafter_args, configuration.engine_argument_names())
    if drafter_args.keys() & {"attention_backend", "attention_config"}:
        config = replace(config, tree_attention=False)
    if config.download_dir is None:
        config = replace(config, download_dir=getattr(engine_args, "download_dir", None))
    if config.tokenizer is None and has_no_tokenizer(config.model):
        logger.info("SSD: the draft model's folder has no tokenizer; using the target's")
        config = replace(config, tokenizer=model_config.tokenizer)
    hf_overrides = getattr(engine_args, "hf_overrides", None)
    overridden = overridden_positions(hf_overrides)
    if not overridden or config.hf_overrides is not None:
        return config
    scaling = inherited_scaling(hf_overrides, lambda: configuration.positions_of(config.model, config.revision))
    if scaling is not None:
        logger.info("SSD: the draft model inherits the target's rope scaling: %s", scaling)
        config = replace(config, hf_overrides=scaling)
    else:
        logger.warning(
            "SSD: the target's hf_overrides (%s) do not apply to the drafter; give hf_overrides in speculative_config "
            "if the draft model needs them for contexts of the same length",
            overridden,
        )
    return config


def replicas_here(parallel_config: Any) -> int:
    """Number of data-parallel replicas on this node; 0 if other servers may run more of them here."""
    if parallel_config.data_parallel_size == 1:
        return 1
    apart = bool(os.environ.get("CUDA_VISIBLE_DEVICES")) and parallel_config.assigned_physical_gpu_ids is None
    if parallel_config.data_parallel_external_lb:  # each replica is its own server
        return int(apart)
    alone = parallel_config.data_parallel_rank_local is not None  # offline, one process per replica
    return 0 if alone or parallel_config.data_parallel_backend == "ray" else parallel_config.data_parallel_size_local


def on_v2(config: SSDConfig, engine_args: Any, parallel_config: Any) -> dict[str, Any]:
    """The speculative_config that selects our speculator on the V2 runner.

    With `adaptive`, also replaces the scheduler class in `engine_args`, unless something prevents it.
    """
    from vllm_ssd.compat.target import runner

    disguise = {
        "method": runner.METHOD_ON_V2,
        "prompt_lookup_min": config.ngram_min,
        "prompt_lookup_max": config.ngram_max,
    }
    if not config.adaptive:
        return disguise
    num_drafts = config.num_speculative_tokens
    obstacle = runner.why_not_adaptive(engine_args, parallel_config)
    if obstacle is not None:
        logger.warning("SSD: `adaptive` has no effect; every round carries %d drafts: %s", num_drafts, obstacle)
        return disguise
    engine_args.scheduler_cls = runner.SCHEDULER
    table = runner.drafts_by_batch_size(num_drafts, engine_args.max_num_seqs)
    return disguise | {"num_speculative_tokens_per_batch_size": table}
