"""Rows with different numbers of drafts in vLLM's gated delta networks on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from vllm_ssd.compat import patch
from vllm_ssd.compat.target import recurrent
from vllm_ssd.compat.version import minor_of

pytestmark = pytest.mark.skipif(minor_of(vllm.__version__) < (0, 32), reason="such targets are refused up to 0.31")

SPEC_FORWARD = f"{recurrent.GATED_DELTA_OPS}:_spec_forward"
WIDTH, NUM_DRAFTS, DIM = 4, 3, 4
STATE_LEN = WIDTH - 1 + NUM_DRAFTS


def metadata(num_tokens: list[int], num_accepted: list[int]) -> GDNAttentionMetadata:
    starts = torch.tensor([0, *num_tokens]).cumsum(0).int()
    count = {name: 0 for name in ("num_prefills", "num_prefill_tokens", "num_decodes", "num_decode_tokens")}
    return GDNAttentionMetadata(
        **count,
        num_spec_decodes=len(num_tokens),
        num_spec_decode_tokens=int(starts[-1]),
        num_actual_tokens=int(starts[-1]),
        spec_query_start_loc=starts,
        spec_state_indices_tensor=torch.arange(len(num_tokens) * (1 + NUM_DRAFTS)).view(len(num_tokens), -1).int(),
        num_accepted_tokens=torch.tensor(num_accepted, dtype=torch.int32),
    )


@pytest.fixture
def convolve(monkeypatch: pytest.MonkeyPatch):
    """vLLM's `_spec_forward` as the patch has it, of whose parts only the convolution computes anything."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    monkeypatch.setattr(gdn_attention, "_spec_forward", patch.original(SPEC_FORWARD))
    recurrent.repair_gated_delta()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(DIM, WIDTH, generator=generator)
    monkeypatch.setattr(gdn_attention, "_unpacked_conv_weight", lambda layer: weight)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(
        gdn_attention.ops, "fused_sigmoid_gating_delta_rule_update_spec_cpu", lambda *, q, **arguments: q
    )
    layer = SimpleNamespace(
        conv1d=SimpleNamespace(bias=None, weight=weight),
        activation="none",
        rearrange_mixed_qkv=lambda qkv: (qkv[None],) * 3,
        A_log=None,
        dt_bias=None,
    )

    def convolve(tokens: torch.Tensor, num_tokens: list[int], num_accepted: list[int], states: torch.Tensor):
        gates, told = torch.zeros(len(tokens), 2), metadata(num_tokens, num_accepted)
        return gdn_attention._spec_forward(layer, told, tokens, gates, gates, states, None, WIDTH, STATE_LEN)

    return convolve, weight


def test_a_convolution_reads_what_was_accepted_however_many_drafts_there_were(convolve) -> None:
    """Three rounds of two requests, of which each emits its accepted drafts and a token more."""
    convolve, weight = convolve
    generator = torch.Generator().manual_seed(1)
    states = torch.zeros(2 * (1 + NUM_DRAFTS), DIM, STATE_LEN)
    texts = [torch.randn(WIDTH - 1, DIM, generator=generator) for _ in range(2)]
    for slot, text in zip((0, 1 + NUM_DRAFTS), texts):
        states[slot, :, : WIDTH - 1] = text.T
    num_accepted = [1, 1]
    for num_tokens, emitted in (([4, 2], [4, 1]), ([1, 4], [1, 3]), ([2, 1], [2, 1]), ([4, 4], [2, 4])):
        tokens = torch.randn(sum(num_tokens), DIM, generator=generator)
        rows = tokens.split(num_tokens)
        out = convolve(tokens, num_tokens, num_accepted, states).split(num_tokens)
        for i, row in enumerate(rows):
            whole = torch.cat([texts[i][-(WIDTH - 1) :], row]).unfold(0, WIDTH, 1)  # [tokens, DIM, WIDTH]
            torch.testing.assert_close(out[i], (whole * weight).sum(-1))
            texts[i] = torch.cat([texts[i], row[: emitted[i]]])
        num_accepted = emitted
