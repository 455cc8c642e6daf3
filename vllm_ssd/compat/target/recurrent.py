"""Targets with recurrent or linear-attention layers, whose state must go back to where drafts were rejected.

vLLM 0.29 to 0.33 keeps a state for each draft, and starts the next round from that of the last accepted token. Where a
layer does not (Mamba-1 nowhere, others not on the CPU), text changes with any speculative method, and ssd is refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch

from vllm_ssd.compat import patch
from vllm_ssd.compat.version import minor_of

GATED_DELTA_OPS = "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention"
GATED_DELTA = (
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
)
"""Architectures whose recurrent layers are gated delta networks, of which vLLM's CPU operations keep the states."""
MAMBA_1 = ("MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM")
"""Architectures whose layers (`MambaMixer`) and metadata (`Mamba1AttentionMetadataBuilder`) know of no drafts."""


def check_target(model_config: Any) -> None:
    """Raise ValueError for a target whose text any speculation would change."""
    import vllm
    from vllm.platforms import current_platform

    architecture = model_config.architecture
    if architecture in MAMBA_1:
        where = "vLLM"
    elif not (model_config.is_hybrid or model_config.is_attention_free) or not current_platform.is_cpu():
        return
    elif architecture in GATED_DELTA and minor_of(vllm.__version__) >= (0, 32):
        return
    else:
        where = "on the CPU vLLM"
    raise ValueError(
        f"ssd: {where} does not take the recurrent state of {architecture} back when drafts are rejected, so that its "
        f"text would change with any speculative method; run it without{'' if where == 'vLLM' else ', or on a GPU'}"
    )


def repair_gated_delta() -> None:
    """Let rows of a batch have different numbers of drafts in gated delta networks on the CPU.

    vLLM 0.32 leaves the inputs of a convolution where the next round expects them in rows of K drafts alone; with fewer
    it raises or reads others. In 0.33 it does not. Idempotent; nothing where no such layer was loaded.
    """
    import vllm

    if GATED_DELTA_OPS in sys.modules and minor_of(vllm.__version__) == (0, 32):
        patch.wrap(f"{GATED_DELTA_OPS}:_spec_forward", _is_ragged, _padded, parameters=_PARAMETERS)


_PARAMETERS = ("layer", "attn_metadata_i", "mixed_qkv_spec", "b_spec", "a_spec", "conv_buf", "ssm_state")
_PARAMETERS += ("width", "state_len")


def _num_tokens(metadata: Any) -> torch.Tensor:
    """Of each row with drafts."""
    return torch.diff(metadata.spec_query_start_loc[: metadata.num_spec_decodes + 1])


def _is_ragged(layer: Any, metadata: Any, *tensors: Any) -> bool:
    *_, width, state_len = tensors
    return bool((_num_tokens(metadata) != state_len - width + 2).any())


def _padded(original: Callable[..., torch.Tensor], layer: Any, metadata: Any, *tensors: Any) -> torch.Tensor:
    """Every row with its last token repeated up to 1 + K; states after that are those of rejected drafts."""
    *by_token, conv_buf, ssm_state, width, state_len = tensors
    longest, num_tokens = state_len - width + 2, _num_tokens(metadata).long()
    place = torch.arange(longest)
    starts = metadata.spec_query_start_loc[: metadata.num_spec_decodes].long()
    tokens = (starts[:, None] + torch.minimum(place, num_tokens[:, None] - 1)).flatten()
    uniform = torch.arange(0, len(tokens) + 1, longest, dtype=metadata.spec_query_start_loc.dtype)
    metadata = dataclasses.replace(metadata, spec_query_start_loc=uniform)
    padded = [tensor.index_select(0, tokens) for tensor in by_token]
    out = original(layer, metadata, *padded, conv_buf, ssm_state, width, state_len)
    return out[(place < num_tokens[:, None]).flatten()]
