"""The options that a drafter process is started with."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_ssd.policy import MAX_LEARNED_FAN_OUT


class DrafterOptions(msgspec.Struct, frozen=True):
    """Options of a drafter process, as JSON on its command line.

    engine_args: vLLM's engine arguments for the draft model; cpus: cores to run on, empty for all; tree_attention: keep
    page tables on the device and read each trunk once, for GPUs; key: path of the credential, if the drafter listens
    for targets; keeper, registry: socket descriptor of the actor that keeps it running and address of Ray's GCS, which
    knows whether that actor still lives (`vllm_ssd.drafter.keeper`).
    """

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
    graphs: bool = True  # capture CUDA graphs of steps on a GPU
    key: str = ""
    keeper: int = -1
    registry: str = ""

    @property
    def max_fan_out(self) -> int:
        """Most branches per fork point."""
        return max_fan_out(self.fan_out, self.max_branches)

    @property
    def max_support(self) -> int:
        """Most token ids per proposal."""
        return max_support(self.top_m, self.fan_out, self.max_branches)


def max_fan_out(fan_out: int | Sequence[int] | None, max_branches: int) -> int:
    """Most branches per fork point, given the user's `fan_out` and the branches per request."""
    if fan_out is None:
        return min(max_branches, MAX_LEARNED_FAN_OUT)
    return fan_out if isinstance(fan_out, int) else max(fan_out)


def max_support(top_m: int, fan_out: int | Sequence[int] | None, max_branches: int) -> int:
    """Most token ids per proposal; may exceed top_m, because on a device one top-k serves proposal and candidates."""
    return max(top_m, max_fan_out(fan_out, max_branches) + 1)
