"""The engine's part of the flags of `vllm serve`, and what vLLM makes of them without starting anything."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NoReturn, cast

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser


class _Parser(FlexibleArgumentParser):
    """Keeps flags that are not the engine's in `others`, and raises ValueError where `vllm serve` would exit."""

    others: list[str] = []

    def parse_known_args(self, args=None, namespace=None) -> Any:
        found, self.others = super().parse_known_args(args, namespace)
        return found, []

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(flags: list[str]) -> tuple[AsyncEngineArgs, list[str]]:
    """The engine arguments that flags of `vllm serve` name, and the flags that are not about the engine.

    Raises ValueError for a value that the engine does not take.
    """
    parser = _Parser()
    AsyncEngineArgs.add_cli_args(parser)
    args = cast(Namespace, parser.parse_args(flags))
    return AsyncEngineArgs.from_cli_args(args), parser.others


def attention_backend(vllm_config: VllmConfig) -> str:
    """The name of the backend that vLLM takes for a decoder's layers; raises what vLLM raises where none fits."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        backend = get_attn_backend(
            model.get_head_size(), model.dtype, vllm_config.cache_config.cache_dtype, use_mla=model.use_mla
        )
    return backend.get_name()


def devices() -> tuple[int, int]:
    """Number of accelerators that vLLM sees, and bytes of each; no accelerator on a CPU."""
    if current_platform.is_cpu():
        return 0, 0
    platform: Any = current_platform
    count = platform.device_count()
    return count, platform.get_device_total_memory() if count else 0
