"""Sampling parameters that vLLM refuses with any speculative method: `min_p` and `logit_bias`.

The V1 rejection sampler does not apply them to drafts. The V2 runner applies them to every row that it verifies
(`Sampler.apply_sampling_params`, 0.32 and 0.33), so there they are allowed with ssd.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ssd.compat import patch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig

logger = logging.getLogger("vllm.vllm_ssd")

VALIDATE = "vllm.sampling_params:SamplingParams._validate_spec_decode"
ALLOWED = "_ssd_applies_all"
"""Attribute of a `SpeculativeConfig` that allows these parameters."""
CONSEQUENCE = "which vLLM's V1 runner refuses with any speculation: requests that do not set min_p to 0 will fail"
REMEDY = "Start with --override-generation-config '{\"min_p\": 0}'"


def allow(config: SpeculativeConfig) -> None:
    """Allow these parameters for a target with this configuration, which has ssd on the V2 runner."""
    setattr(config, ALLOWED, True)
    patch.wrap(VALIDATE, _is_allowed, _accept, parameters=("speculative_config",))


def default_min_p(model_config: ModelConfig) -> float:
    """`min_p` in the target's default sampling parameters, 0 if unset; vLLM's V1 runner refuses requests with it."""
    return model_config.get_diff_sampling_param().get("min_p") or 0.0


def warn(model_config: ModelConfig) -> None:
    """Warn at startup if the target's defaults contain `min_p`, with which every request would fail."""
    min_p = default_min_p(model_config)
    if min_p:
        logger.warning("SSD: the target's generation config sets min_p %g, %s. %s", min_p, CONSEQUENCE, REMEDY)


def _is_allowed(params: Any, speculative_config: SpeculativeConfig | None) -> bool:
    return getattr(speculative_config, ALLOWED, False)


def _accept(original: Callable[..., None], params: Any, speculative_config: SpeculativeConfig | None) -> None:
    """Accept the parameters."""
