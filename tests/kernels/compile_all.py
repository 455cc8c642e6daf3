"""`python compile_all.py CAPABILITY`: compile every kernel as the ops launch it, without a GPU; JSON lines on stdout.

A driver that only names its target stands in for CUDA's; Triton then compiles to a cubin and stops short of the launch.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from vllm_ssd.kernels import (
    Blocks,
    DevicePool,
    Speculation,
    Trees,
    commit,
    copy_pages,
    expand,
    lookup,
    reserve,
    sample,
    share,
    tree_attention,
)

ATTENTION = [
    # dtype, query heads, KV heads, head size, page size, sliding window, soft cap
    (torch.bfloat16, 32, 8, 64, 16, 0, 0.0),  # Llama-3.2-1B
    (torch.bfloat16, 16, 8, 128, 16, 0, 0.0),  # Qwen3-0.6B
    (torch.float16, 14, 2, 64, 128, 0, 0.0),  # Qwen2.5-0.5B
    (torch.bfloat16, 8, 4, 256, 32, 4096, 50.0),  # Gemma-2-2B
    (torch.float32, 6, 2, 80, 32, 0, 0.0),
]


class NoLaunch:
    """The parts of Triton's driver that compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int) -> None:
    """Call every op on CPU tensors as if they were on a GPU of this compute capability."""
    triton.runtime.driver.set_active(NoLaunch(capability))
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        size, shared = len(kernel.asm["cubin"]), kernel.metadata.shared
        print(json.dumps({"kernel": self.__name__, "cubin": size, "shared": shared}))
        return kernel

    triton.JITFunction.run = compile_only
    for name in ("commit", "copy_pages", "expand", "lookup", "reserve", "sample", "share", "tree_attention"):
        sys.modules[f"vllm_ssd.kernels.{name}"].use_triton = lambda tensor: True

    requests, branches, drafts, candidates = 8, 24, 5, 17
    pool = DevicePool.full(4096, "cpu")
    trees = Trees.empty(requests, branches, drafts, 16, 512, "cpu")
    some = torch.ones(requests, dtype=torch.int32)
    reserve(pool, trees, some)
    share(pool, trees, some, some)
    fan_out, forks = some.repeat(drafts + 1, 1).T.contiguous(), some.repeat(2, 1).T.contiguous()
    candidate_ids = torch.zeros(requests, drafts + 1, candidates, dtype=torch.int32)
    expand(pool, trees, some, fan_out[:, :drafts].contiguous(), candidate_ids, fan_out, forks)
    commit(pool, trees, some)
    caches = [torch.zeros(64, 16, 8, 64, dtype=torch.bfloat16) for _ in range(4)]
    copy_pages(caches, trees.copy_sources, trees.branch_pages[:, :, 0].contiguous(), trees.copy_lens)
    for top_m in (0, 64):
        old = Speculation(
            torch.zeros(requests, drafts, dtype=torch.int32),
            torch.zeros(requests, drafts, top_m, dtype=torch.int32),
            torch.zeros(requests, drafts, top_m),
            some,
        )
        blocks = Blocks.empty(requests, branches, drafts, top_m, "cpu")
        lookup(blocks, some, some.long(), some.long(), some, some, old)
    logits = torch.zeros(requests, 128256, dtype=torch.bfloat16)
    sample(logits, some.float(), some.long(), some.long(), some, top_m=64)
    rows = requests * branches
    own_pages, ones = torch.zeros(rows, 2, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    starts = torch.arange(0, rows + 1, branches, dtype=torch.int32)
    tables = torch.zeros(requests, 512, dtype=torch.int32)
    for dtype, heads, kv_heads, head_size, page_size, window, soft_cap in ATTENTION:
        query = torch.zeros(rows, heads, head_size, dtype=dtype)
        cache = torch.zeros(16, page_size, kv_heads, head_size, dtype=dtype)
        tree_attention(
            query,
            cache,
            cache,
            tables,
            starts,
            ones,
            own_pages,
            ones,
            scale=0.1,
            max_shared_len=8192,
            max_rows=branches,
            sliding_window=window,
            soft_cap=soft_cap,
            num_splits=8,
        )


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
