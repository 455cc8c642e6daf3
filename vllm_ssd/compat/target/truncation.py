"""Translate a request's sampling parameters for the drafter."""

from __future__ import annotations

from vllm.sampling_params import SamplingParams

from vllm_ssd.link.protocol import ALL_TOKENS, NO_BIAS, Truncation, pack_bias


def truncation_of(params: SamplingParams) -> Truncation:
    """The `Truncation` for top_k, top_p, min_p, `allowed_token_ids` and `logit_bias`.

    vLLM's top_k is 0 or -1 if it is not set.
    """
    bias = NO_BIAS
    if params.allowed_token_ids or params.logit_bias:
        bias = pack_bias(params.allowed_token_ids or (), params.logit_bias or {})
    truncation = Truncation(max(params.top_k, 0), params.top_p, params.min_p, bias)
    return ALL_TOKENS if truncation == ALL_TOKENS else truncation
