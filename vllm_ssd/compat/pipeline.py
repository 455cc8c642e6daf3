"""Speculation under pipeline parallelism, where vLLM's V1 runner forgets that early ranks have no proposer.

`GPUModelRunner._build_attention_metadata` (0.30 to 0.32) reads `self.drafter` on every rank, but only the last one
has it: any speculative method fails there. vLLM imports a worker extension in every worker, which mends it.
"""

from __future__ import annotations

import functools

from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class WorkerExtension:
    """Mixed into vLLM's worker class; importing it is what counts."""


def _name_missing_proposer(get_metadata):
    @functools.wraps(get_metadata)
    def wrapped(self, *args, **kwargs):
        if not hasattr(self, "drafter"):
            self.drafter = None
        return get_metadata(self, *args, **kwargs)

    return wrapped


GPUModelRunner._build_attention_metadata = _name_missing_proposer(GPUModelRunner._build_attention_metadata)
