"""Which tokens a request's sampling parameters leave it."""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

from vllm_ssd.link.protocol import ALL_TOKENS, NO_BIAS, Truncation, pack_bias


def truncation_of(params: SamplingParams) -> Truncation:
    """top_k, top_p, min_p, `allowed_token_ids` and `logit_bias` as the drafter is told of them.

    vLLM's top_k is 0 or -1 where there is none.
    """
    bias = NO_BIAS
    if params.allowed_token_ids or params.logit_bias:
        bias = pack_bias(params.allowed_token_ids or (), params.logit_bias or {})
    truncation = Truncation(max(params.top_k, 0), params.top_p, params.min_p, bias)
    return ALL_TOKENS if truncation == ALL_TOKENS else truncation
