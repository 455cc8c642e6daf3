"""Predict which of vLLM's two model runners is used, and install our speculator and scheduler on V2."""

from __future__ import annotations

import enum
import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ssd.compat import patch
from vllm_ssd.compat.version import UnsupportedVLLM, minor_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

METHOD_ON_V2 = "ngram_gpu"
"""vLLM's method under which ssd runs on V2: it supports asynchronous scheduling and loads no model."""

SCHEDULER = "vllm_ssd.compat.target.scheduler.scheduler"
"""Scheduler class on the V2 runner if the number of drafts adapts."""


class DrafterState(enum.IntEnum):
    """State of the drafter at the start of a round on the V2 runner, which decides whether to learn from the round."""

    IN_TIME = 0
    BEHIND = 1  # reading prompts, compiling or starting
    AWAY = 2  # not connected, and there are no n-gram drafts either


DRAFTER_STATE = "ssd_drafter_state"
"""Attribute of vLLM's model runner output that carries the `DrafterState` from the worker to the scheduler."""


def is_v2() -> bool:
    """Whether vLLM will use the V2 runner, predicted before it has built its configuration."""
    return choose_runner()[0]


def choose_runner() -> tuple[bool, str]:
    """Whether vLLM will use the V2 runner, and the reason."""
    import vllm

    if importlib.util.find_spec("vllm.v1.worker.gpu.spec_decode.ngram") is None:  # up to 0.31
        return False, f"vLLM {vllm.__version__} has no method on V2 that ssd can pass for; 0.32 has"
    import vllm.envs as envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    asked = envs.VLLM_USE_V2_MODEL_RUNNER
    if asked is not None:
        return asked, f"VLLM_USE_V2_MODEL_RUNNER={int(asked)}"
    if HAS_TRITON:
        return True, "Triton works here"
    if minor_of(vllm.__version__) >= (0, 33) and current_platform.is_unspecified():
        return True, "the platform is unspecified"
    return False, "Triton does not work here"


def drafts_by_batch_size(num_speculative_tokens: int, max_num_seqs: int | None) -> list[list[int]]:
    """A `num_speculative_tokens_per_batch_size` with 0, 1, 2, 4, ... and all drafts, one batch size each.

    vLLM captures CUDA graphs for the numbers in this table; with few batch sizes it has fewer numbers.
    """
    from vllm_ssd.policy import draft_grid

    *fewer, most = draft_grid(num_speculative_tokens)
    counts = [most, *fewer][:max_num_seqs]
    return [[i, i, count] for i, count in enumerate(sorted(counts), start=1)]


def why_not_adaptive(engine_args: Any, parallel_config: Any) -> str | None:
    """Why the number of drafts cannot adapt on the V2 runner; None if it can."""
    from vllm.config import SpeculativeConfig

    if not hasattr(SpeculativeConfig, "uses_dynamic_speculative_decoding"):
        return "this vLLM has one number of drafts for all batch sizes"
    if parallel_config.data_parallel_size > 1:
        return "vLLM wants the same number of drafts on all data-parallel ranks"
    if engine_args.scheduler_cls is not None:
        return "scheduler_cls is set already"
    if engine_args.max_num_seqs == 1:
        return "vLLM chooses the number of drafts by batch size, and max_num_seqs is 1"
    return None


def has_ssd(config: Any) -> bool:
    """Whether this `VllmConfig` belongs to a target with ssd."""
    ours = getattr(config, "additional_config", None)
    return isinstance(ours, dict) and "ssd" in ours


def check_runner(config: VllmConfig) -> None:
    """Raise `UnsupportedVLLM` if vLLM chose another runner than `is_v2` predicted, or a lossy verification."""
    speculative = config.speculative_config
    expected = has_ssd(config) and speculative is not None and speculative.method == METHOD_ON_V2
    if has_ssd(config) and config.use_v2_model_runner != expected:
        runner, other = ("V2", 1) if config.use_v2_model_runner else ("V1", 0)
        raise UnsupportedVLLM(
            f"speculative method 'ssd': vLLM chose its {runner} model runner for other reasons than "
            f"VLLM_USE_V2_MODEL_RUNNER; set VLLM_USE_V2_MODEL_RUNNER={other}"
        )
    verification = getattr(config.speculative_config, "rejection_sample_method", "standard")
    if has_ssd(config) and verification != "standard":
        raise UnsupportedVLLM(
            f"speculative method 'ssd': vLLM verifies drafts by {verification!r}, ssd by 'standard' only"
        )


def install_speculator(build: Callable[..., Any]) -> None:
    """Make the V2 runner `build` our speculator for targets with ssd; idempotent, and cheap to import.

    vLLM calls `init_speculator` with `(vllm_config, device, req_states)`, up to 0.31 without the last. Its runner
    module imports the function by name, usually after plugins have been loaded.
    """

    def init_speculator(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return build(*args, **kwargs)

    for module in ("vllm.v1.worker.gpu.spec_decode", "vllm.v1.worker.gpu.model_runner"):
        if module.endswith("spec_decode") or module in sys.modules:
            patch.wrap(f"{module}:init_speculator", _is_for_ssd, init_speculator, parameters=("vllm_config", "device"))


def _is_for_ssd(vllm_config: Any, *args: Any, **kwargs: Any) -> bool:
    return has_ssd(vllm_config)
