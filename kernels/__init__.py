"""The operations of a speculation round on the device, each a PyTorch reference and a Triton kernel of one meaning.

Imports torch and triton only. Round of the drafter: `share` the pages of a prompt that another request has computed,
`reserve` pages for tokens nobody predicted, `expand` outcomes into branches, `copy_pages` their shared tail pages, then
K + 1 steps of the model with `tree_attention` and `sample`; when the outcome is known, `commit` the winner. On the
target: `lookup` the outcome, and `write_draft_logits` where requests sample. docs/kernels.md has the picture.
"""

from vllm_ssd.kernels.blocks import DeviceBlocks
from vllm_ssd.kernels.commit import CLOSE, MISS, SKIP, commit
from vllm_ssd.kernels.copy_pages import copy_pages
from vllm_ssd.kernels.dispatch import reference_ops
from vllm_ssd.kernels.draft_logits import write_draft_logits
from vllm_ssd.kernels.expand import expand
from vllm_ssd.kernels.lookup import OUTCOME_COLUMNS, DeviceSpeculation, Found, lookup
from vllm_ssd.kernels.reserve import reserve
from vllm_ssd.kernels.sample import Sample, sample
from vllm_ssd.kernels.share import share
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
    "commit",
    "copy_pages",
    "expand",
    "lookup",
    "reference_ops",
    "reserve",
    "sample",
    "share",
    "tree_attention",
    "write_draft_logits",
]
