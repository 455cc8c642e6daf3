"""Which tokens a request's sampling parameters leave it."""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

from vllm_ssd.link.protocol import ALL_TOKENS, Truncation


def truncation_of(params: SamplingParams) -> Truncation:
    """top_k, top_p and min_p as the drafter is told of them; vLLM's top_k is 0 or -1 where there is none."""
    truncation = Truncation(max(params.top_k, 0), params.top_p, params.min_p)
    return ALL_TOKENS if truncation == ALL_TOKENS else truncation
