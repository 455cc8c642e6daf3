"""`python compile_all.py CAPABILITY...`: compile all kernels as the ops launch them, without a GPU; prints JSON lines.

A driver that only names its target stands in for CUDA's; Triton then compiles to a cubin and stops short of the launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from vllm_ssd.kernels import (
    OUTCOME_COLUMNS,
    DeviceBlocks,
    DevicePool,
    DeviceSpeculation,
    Trees,
    commit,
    copy_pages,
    expand,
    lookup,
    reserve,
    sample,
    tree_attention,
    write_draft_logits,
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
    """Call every op on CPU tensors as if they were on a GPU of this compute capability; a line a compiled variant."""
    triton.runtime.driver.set_active(NoLaunch(capability))
    run, hashes = triton.JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in hashes:
            hashes.add(kernel.hash)
            size, shared = len(kernel.asm["cubin"]), kernel.metadata.shared
            constants = {name: kwargs[name] for name in ("HEAD", "BLOCK_M", "BLOCK_T", "M") if name in kwargs}
            usage = {"cubin": size, "shared": shared, "stack": stack_bytes(kernel.asm["cubin"])}
            print(json.dumps({"capability": capability, "kernel": self.__name__, **usage, "constants": constants}))
        return kernel

    triton.JITFunction.run = compile_only
    names = ("commit", "copy_pages", "draft_logits", "expand", "lookup", "reserve", "sample", "tree_attention")
    for name in names:
        sys.modules[f"vllm_ssd.kernels.{name}"].use_triton = lambda tensor: True

    requests, branches, drafts, candidates = 8, 24, 5, 17
    pool = DevicePool.full(4096, "cpu")
    trees = Trees.empty(requests, branches, drafts, 16, 512, "cpu")
    some = torch.ones(requests, dtype=torch.int32)
    reserve(pool, trees, some)
    fan_out, forks = some.repeat(drafts + 1, 1).T.contiguous(), some.repeat(2, 1).T.contiguous()
    candidate_ids = torch.zeros(requests, drafts + 1, candidates, dtype=torch.int32)
    expand(pool, trees, some, fan_out[:, :drafts].contiguous(), candidate_ids, fan_out, forks)
    commit(pool, trees, some)
    caches = [torch.zeros(64, 16, 8, 64, dtype=torch.bfloat16) for _ in range(4)]
    copy_pages(caches, trees.copy_sources, trees.branch_pages[:, :, 0].contiguous(), trees.copy_lens)
    for top_m in (0, 1, 64, 4096):
        for has_ngram in (False, True):
            step_of_the_target(top_m, has_ngram=has_ngram)
        warm = set(hashes)
        for batch, start, wanted in ((1, 0, 1), (1, 1, 0), (16, 0, 16), (17, 3, 5), (32, 1, 16)):
            step_of_the_target(top_m, batch, start, wanted, has_ngram=batch > 16)
        assert hashes == warm, "a request would wait for a compiler"
    logits = torch.zeros(requests, 128256, dtype=torch.bfloat16)
    sample(logits, some.float(), some.long(), some.long(), some, top_m=64)
    told = {"truncations": torch.ones(requests, 3), "biases": torch.zeros(17, 128256), "bias_rows": some}
    for of_target in ({}, {"target_seeds": some.long(), "foreseen": some}):
        sample(logits, some.float(), some.long(), some.long(), some, top_m=64, num_candidates=17, **told, **of_target)
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


def stack_bytes(cubin: bytes) -> int:
    """Local memory of a thread, where registers go that there are too few of, by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


def step_of_the_target(top_m: int, batch: int = 1, start: int = 0, wanted: int = 5, *, has_ngram: bool = False) -> None:
    """What V2's speculator launches, its rows `start` after an aligned address."""
    slots, drafts = 64, 5

    def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(start + size, dtype=dtype)[start:]

    blocks = DeviceBlocks.empty(slots, 24, drafts, top_m, "cpu")
    verifying = DeviceSpeculation.empty(slots, drafts, top_m, "cpu")
    rows, temperatures = zeros(batch, torch.int64), zeros(slots, torch.float32)
    by_slot = zeros(slots, torch.int64), zeros(slots, torch.int32), zeros(slots, torch.int64)[:, None]
    out = torch.zeros(slots, 1 + drafts, dtype=torch.int64), torch.zeros(slots, OUTCOME_COLUMNS + drafts).int()
    ngram = torch.zeros(slots, drafts, dtype=torch.int64)[:batch] if has_ngram else None
    lookup(blocks, verifying, rows, zeros(batch, torch.int32), *by_slot, temperatures, wanted, *out, ngram)
    columns, logits = torch.zeros(slots, drafts, top_m, dtype=torch.int32), torch.zeros(slots, drafts, 8192)
    write_draft_logits(logits, columns, verifying, rows, temperatures)


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        if (child := os.fork()) == 0:  # Triton keeps to the device that it has met first
            compile_all(capability)
            sys.exit()
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
