"""The device operations of a speculation round, each with a PyTorch reference and an equivalent Triton kernel.

Imports torch and triton only. A round on the drafter: `reserve` pages for tokens that were not predicted, `expand`
outcomes into branches, `copy_pages` their shared tail pages, run K + 1 steps of the model with `tree_attention` and
`sample`, and `commit` the winner once the outcome is known. Between requests: `keep`, `adopt` and `drop` cached pages.
On the target: `lookup` the outcome, and `write_draft_logits` for sampled requests. See docs/kernels.md.
"""

from vllm_ssd.kernels.blocks import DeviceBlocks
from vllm_ssd.kernels.commit import CLOSE, MISS, SKIP, commit
from vllm_ssd.kernels.copy_pages import copy_pages
from vllm_ssd.kernels.dispatch import reference_ops
from vllm_ssd.kernels.draft_logits import write_draft_logits
from vllm_ssd.kernels.expand import expand
from vllm_ssd.kernels.lookup import OUTCOME_COLUMNS, DeviceSpeculation, Found, lookup
from vllm_ssd.kernels.noise import hashed_gumbel
from vllm_ssd.kernels.prefix import adopt, drop, keep
from vllm_ssd.kernels.reserve import reserve
from vllm_ssd.kernels.sample import Sample, sample
from vllm_ssd.kernels.tree_attention import tree_attention
from vllm_ssd.kernels.trees import DevicePool, Trees

__all__ = [
    "CLOSE",
    "MISS",
    "OUTCOME_COLUMNS",
    "SKIP",
    "DeviceBlocks",
    "DevicePool",
    "Found",
    "Sample",
    "DeviceSpeculation",
    "Trees",
    "adopt",
    "commit",
    "copy_pages",
    "drop",
    "expand",
    "hashed_gumbel",
    "keep",
    "lookup",
    "reference_ops",
    "reserve",
    "sample",
    "tree_attention",
    "write_draft_logits",
]
