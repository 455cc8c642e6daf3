"""Hooks into vLLM's `EngineArgs`, where the user selects ssd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vllm_ssd.compat import patch
from vllm_ssd.compat.target import cache_salt, refused
from vllm_ssd.compat.target.runner import METHOD_ON_V2, check_runner, has_ssd
from vllm_ssd.compat.version import UnsupportedVLLM

SPECULATIVE_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_speculative_config"
ENGINE_CONFIG = "vllm.engine.arg_utils:EngineArgs.create_engine_config"


def asks_for_ssd(engine_args: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether the user selected speculative method "ssd", in any way that vLLM accepts."""
    config = getattr(engine_args, "speculative_config", None)
    method = config.get("method") if isinstance(config, dict) else None
    return method == "ssd" or getattr(engine_args, "spec_method", None) == "ssd"


def engine_argument_names() -> frozenset[str]:
    """The names of vLLM's `EngineArgs`."""
    from vllm.engine.arg_utils import EngineArgs

    return frozenset(field.name for field in fields(EngineArgs) if not field.name.startswith("_"))


def positions_of(model: str, revision: str | None) -> tuple[dict[str, Any], int]:
    """A model's `rope_parameters` and `max_position_embeddings` for text; ({}, 0) if they cannot be read."""
    from vllm.transformers_utils.config import get_config

    try:
        config = get_config(model, trust_remote_code=False, revision=revision).get_text_config()
        return dict(config.rope_parameters), int(config.max_position_embeddings)
    except Exception:  # the drafter's startup reports what is wrong with an invalid model
        return {}, 0


def install(translate: Callable[[Any, Any, Any], None]) -> None:
    """Call `translate(engine_args, model_config, parallel_config)` to rewrite configurations that select ssd.

    Also checks which runner vLLM chose once it has built its configuration.
    """

    def create_speculative_config(
        original: Callable[..., Any], engine_args: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        translate(engine_args, target_model_config, target_parallel_config)
        cache_salt.carry()
        config = original(engine_args, target_model_config, target_parallel_config)
        if config.method == METHOD_ON_V2:
            refused.allow(config)
        else:
            refused.warn(target_model_config)
        return config

    parameters = ("target_model_config", "target_parallel_config")
    patch.wrap(SPECULATIVE_CONFIG, asks_for_ssd, create_speculative_config, parameters=parameters)
    patch.wrap(ENGINE_CONFIG, _has_or_asks_for_ssd, _create_engine_config)


def refuse(reason: Exception) -> None:
    """Raise an error with `reason` for every configuration that selects ssd, as far as this vLLM can be patched."""

    def refuse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedVLLM(f"speculative method 'ssd' is not available: {reason}") from reason

    for symbol in (SPECULATIVE_CONFIG, ENGINE_CONFIG):
        with contextlib.suppress(Exception):
            patch.wrap(symbol, asks_for_ssd, refuse)


def _has_or_asks_for_ssd(engine_args: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether ssd is selected or was: `translate` rewrites the arguments, which may be used a second time."""
    return asks_for_ssd(engine_args) or has_ssd(engine_args)


def _create_engine_config(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    config = original(*args, **kwargs)
    check_runner(config)
    return config
