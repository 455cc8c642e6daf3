"""Parse the engine's flags of `vllm serve`, and ask vLLM about the configuration without starting it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NoReturn, cast

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser


class _Parser(FlexibleArgumentParser):
    """Keeps flags that are not the engine's in `others`, and raises ValueError instead of exiting."""

    others: list[str] = []

    def parse_known_args(self, args=None, namespace=None) -> Any:
        found, self.others = super().parse_known_args(args, namespace)
        return found, []

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(flags: list[str]) -> tuple[AsyncEngineArgs, list[str]]:
    """Parse flags of `vllm serve` into engine arguments, and return the other flags, too.

    Raises ValueError for invalid values of engine flags.
    """
    parser = _Parser()
    AsyncEngineArgs.add_cli_args(parser)
    args = cast(Namespace, parser.parse_args(flags))
    return AsyncEngineArgs.from_cli_args(args), parser.others


def attention_backend(vllm_config: VllmConfig) -> str:
    """Name of the attention backend that vLLM selects for a decoder; raises what vLLM raises if none fits."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        backend = get_attn_backend(
            model.get_head_size(), model.dtype, vllm_config.cache_config.cache_dtype, use_mla=model.use_mla
        )
    return backend.get_name()


def devices() -> tuple[int, int]:
    """Number of accelerators that vLLM sees, and the memory of each in bytes; (0, 0) on a CPU."""
    if current_platform.is_cpu():
        return 0, 0
    platform: Any = current_platform
    count = platform.device_count()
    return count, platform.get_device_total_memory() if count else 0
