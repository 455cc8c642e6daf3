"""Warn that the drafter is stale when the target's weights change, as in reinforcement learning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm_ssd.compat import patch
from vllm_ssd.compat.target.runner import has_ssd

logger = logging.getLogger("vllm.vllm_ssd")


def warn_of_new_weights() -> None:
    """Log a warning whenever this worker's target gets new weights; works on both runners, idempotent."""
    for name in ("reload_weights", "finish_weight_update"):
        patch.wrap(f"vllm.v1.worker.gpu_worker:Worker.{name}", _is_ours, _then_warn)


def _is_ours(worker: Any, *args: Any, **kwargs: Any) -> bool:
    return has_ssd(getattr(worker, "vllm_config", None))


def _then_warn(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    logger.warning(
        "SSD: the target has new weights, but the drafter keeps the weights it started with: fewer drafts are "
        "accepted, the output is unaffected"
    )
    return result
