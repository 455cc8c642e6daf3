"""Refuse targets whose text any speculation would change: recurrent state that is not rolled back, and prefix LMs."""

from __future__ import annotations

from typing import Any

from vllm_ssd.compat.prefix_lm import PREFIX_LMS
from vllm_ssd.compat.target import runner
from vllm_ssd.compat.version import minor_of

MAMBA_1 = ("MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM")
"""Architectures whose layers (`MambaMixer`) and metadata (`Mamba1AttentionMetadataBuilder`) do not support drafts."""


def check_target(model_config: Any) -> None:
    """Raise ValueError for a target whose text any speculative method would change in vLLM 0.29 to 0.33.

    vLLM keeps a state per draft, and starts the next round from that of the last accepted token. The exceptions are
    Mamba-1 layers and, up to 0.31, rounds without drafts. The V1 runner does not count accepted drafts for models
    without any attention (`_update_states_after_model_execute`). On the CPU, the operations for Mamba-2 and short
    convolutions ignore that count, and with gated delta networks the text changes, too.
    """
    import vllm
    from vllm.platforms import current_platform

    architecture = model_config.architecture
    if architecture in PREFIX_LMS:
        raise ValueError(
            f"ssd: the target {architecture} is a prefix LM, and vLLM lets its drafts attend to later ones, so that "
            "its text would change with any speculative method; run it without"
        )
    if architecture in MAMBA_1:
        where, instead = "vLLM", ""
    elif not (model_config.is_hybrid or model_config.is_attention_free):
        return
    elif current_platform.is_cpu():
        where, instead = "on the CPU vLLM", ", or on a GPU"
    elif minor_of(vllm.__version__) < (0, 32):
        where, instead = f"vLLM {vllm.__version__}", ", or with vLLM 0.32"
    elif model_config.is_attention_free and not runner.is_v2():
        where, instead = "on the V1 runner vLLM", ", or on V2"
    else:
        return
    raise ValueError(
        f"ssd: {where} does not take the recurrent state of {architecture} back when drafts are rejected, so that its "
        f"text would change with any speculative method; run it without{instead}"
    )
