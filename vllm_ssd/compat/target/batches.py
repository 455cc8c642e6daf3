"""How many batches vLLM's engine may have in flight."""

from __future__ import annotations

from vllm.config import VllmConfig


def run_one_batch_at_a_time() -> None:
    """Keep an engine with ssd on the V1 runner from overlapping batches, which it does under pipeline parallelism.

    There, vLLM (0.30 to 0.32) asks for drafts after each batch it starts and gets those of the batch in flight. Its
    scheduler takes them for verifiable and schedules their requests again before their bonus tokens are known.
    Idempotent; every process needs it.
    """
    original = vars(VllmConfig).get("max_concurrent_batches")
    if not isinstance(original, property) or getattr(original.fget, "_vllm_ssd", False):
        return  # an unsupported vLLM is refused when ssd is asked for, not here

    def max_concurrent_batches(self: VllmConfig) -> int:
        speculative, ours = self.speculative_config, self.additional_config
        if (
            speculative is not None
            and speculative.method == "custom_class"
            and isinstance(ours, dict)
            and "ssd" in ours
        ):
            return 1
        return original.fget(self)

    max_concurrent_batches._vllm_ssd = True
    VllmConfig.max_concurrent_batches = property(max_concurrent_batches)
