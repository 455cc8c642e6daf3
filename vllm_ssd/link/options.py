"""What a drafter process is told at start."""

from __future__ import annotations

import msgspec

from vllm_ssd.policy import MAX_LEARNED_FAN_OUT


class DrafterOptions(msgspec.Struct, frozen=True):
    """JSON on the drafter's command line. engine_args: of vLLM; cpus: cores to run on, empty for all; tree_attention:
    keep pages on the device and read each trunk once, which pays on a GPU."""

    engine_args: dict
    num_speculative_tokens: int
    fan_out: int | list[int] | None
    branch_budget: int | None
    max_num_seqs: int
    max_branches: int
    top_m: int
    cpus: list[int]
    parent_pid: int
    tree_attention: bool = False
    saguaro_c: float = 1.0

    @property
    def max_fan_out(self) -> int:
        """Most branches that may start at one fork point."""
        if self.fan_out is None:
            return min(self.max_branches, MAX_LEARNED_FAN_OUT)
        return self.fan_out if isinstance(self.fan_out, int) else max(self.fan_out)

    @property
    def max_support(self) -> int:
        """Most token ids in the proposal of one draft."""
        return max(self.top_m, self.max_fan_out + 1)
