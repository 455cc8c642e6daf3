"""What a drafter process is told at start."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_ssd.policy import MAX_LEARNED_FAN_OUT


class DrafterOptions(msgspec.Struct, frozen=True):
    """JSON on the drafter's command line. engine_args: of vLLM; cpus: cores to run on, empty for all; tree_attention:
    keep pages on the device and read each trunk once, which pays on a GPU; key: path of the credential, of a drafter
    that listens; keeper, registry: descriptor of a socket to who keeps it running, and the address of what knows
    whether anybody still does (`vllm_ssd.drafter.keeper`)."""

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
    graphs: bool = True  # capture steps on a GPU
    key: str = ""
    keeper: int = -1
    registry: str = ""

    @property
    def max_fan_out(self) -> int:
        """Most branches that may start at one fork point."""
        return max_fan_out(self.fan_out, self.max_branches)

    @property
    def max_support(self) -> int:
        """Most token ids in the proposal of one draft."""
        return max_support(self.top_m, self.fan_out, self.max_branches)


def max_fan_out(fan_out: int | Sequence[int] | None, max_branches: int) -> int:
    """Most branches that may start at one fork point, of the user's `fan_out` and a request's branches."""
    if fan_out is None:
        return min(max_branches, MAX_LEARNED_FAN_OUT)
    return fan_out if isinstance(fan_out, int) else max(fan_out)


def max_support(top_m: int, fan_out: int | Sequence[int] | None, max_branches: int) -> int:
    """Most token ids in the proposal of one draft: on a device, proposals and candidates come from one list."""
    return max(top_m, max_fan_out(fan_out, max_branches) + 1)
