"""Time the drafter's kernels on a GPU, against the memory they must move and against the usual ways of doing it.

    python scripts/bench_kernels.py --out kernels.jsonl            # everything, a few minutes
    python scripts/bench_kernels.py --quick                        # one shape of each, to see that it runs

Tree attention is compared with vLLM's FlashAttention, one page table a branch, and with FlashInfer's cascade; either is
left out with a note where it is not installed. Nothing is timed that has not given the right result first. Times are
medians of CUDA graph replays, so they hold no launch overhead. The replays cycle through several times more KV than
fits the L2 cache, as the layers of a model do. One JSON object a line.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
import triton

from vllm_ssd.kernels import (
    MISS,
    OUTCOME_COLUMNS,
    DeviceBlocks,
    DevicePool,
    DeviceSpeculation,
    Trees,
    commit,
    copy_pages,
    expand,
    hashed_gumbel,
    lookup,
    reserve,
    sample,
    tree_attention,
    write_draft_logits,
)

HEADS = {"Llama-3.2-1B": (32, 8, 64), "Qwen3-0.6B": (16, 8, 128)}
"""Query heads, KV heads, head size."""
PAGE_SIZE = 16
NUM_DRAFTS = 5
VOCAB_SIZE, LAYERS = 128_256, 16
"""Of Llama-3.2-1B."""
CYCLED_BYTES = 512 << 20
"""KV that replays cycle through: several times the L2 cache of today's GPUs."""
TOLERANCE = 2e-2
"""Of bfloat16 outputs of order one."""


def main() -> int:
    """Parse, refuse without a GPU, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file as well")
    parser.add_argument("--quick", action="store_true", help="one shape of each kernel")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], metavar="R")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768], metavar="TOKENS")
    parser.add_argument("--branches", type=int, nargs="+", default=[8, 24, 48], metavar="N", help="of each request")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels: no CUDA device is visible; the kernels can only be timed on a GPU", file=sys.stderr)
        return 2
    if args.quick:
        args.requests, args.contexts, args.branches = args.requests[:1], args.contexts[:1], args.branches[:1]
    output = args.out.open("a") if args.out else None

    def report(**row: object) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if output:
            output.write(line + "\n")
            output.flush()

    bandwidth = copy_bandwidth()
    report(kind="machine", **describe_machine(), copy_gb_per_s=bandwidth / 1e9)
    sizes = itertools.product(args.requests, args.contexts, args.branches)
    for model, (num_requests, context, branches) in itertools.product(HEADS, sizes):
        for row in bench_attention(model, num_requests, context, branches, bandwidth):
            report(kind="tree_attention", **row)
    for num_requests in args.requests:
        report(kind="pages", **bench_pages(num_requests))
        report(kind="lookup", **bench_lookup(num_requests))
        report(kind="sample", **bench_sample(24 * num_requests))
    return 0


def describe_machine() -> dict[str, object]:
    """Hardware, versions, commit and command."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit_id = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    versions = {}
    for package in ("torch", "triton", "vllm", "flashinfer-python"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name(),
        "commit": commit_id + (" with changes" if changed else ""),
        "command": " ".join(sys.argv),
        "versions": versions,
    }


def median_us(step: Callable[[], object]) -> float:
    """Median time of one replay of `step` in microseconds."""
    return 1e3 * cast(float, triton.testing.do_bench_cudagraph(step, rep=50, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB: what memory can be expected to give."""
    source = torch.empty(1 << 30, dtype=torch.int16, device="cuda")
    destination = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * median_us(lambda: destination.copy_(source)))


def bench_attention(
    model: str, num_requests: int, context: int, branches: int, bandwidth: float
) -> Iterator[dict[str, object]]:
    """One step of all branches over trunks of `context` tokens and suffixes of three tokens."""
    heads, kv_heads, head_size = HEADS[model]
    trunk_pages, rows = context // PAGE_SIZE, num_requests * branches
    pages_per_copy = num_requests * trunk_pages + rows
    token_bytes = 2 * kv_heads * head_size * 2
    copies = max(1, min(64, CYCLED_BYTES // (pages_per_copy * PAGE_SIZE * token_bytes)))
    cache = torch.randn(copies * pages_per_copy, 2, PAGE_SIZE, kv_heads, head_size, dtype=torch.bfloat16, device="cuda")
    keys, values = cache.unbind(1)
    query = torch.randn(rows, heads, head_size, dtype=torch.bfloat16, device="cuda")
    tables = torch.arange(num_requests * trunk_pages, dtype=torch.int32, device="cuda").view(num_requests, -1)
    own_pages = torch.arange(tables.numel(), pages_per_copy, dtype=torch.int32, device="cuda").view(rows, 1)
    starts = torch.arange(0, rows + 1, branches, dtype=torch.int32, device="cuda")
    shared_lens = torch.full((rows,), trunk_pages * PAGE_SIZE, dtype=torch.int32, device="cuda")
    own_lens = torch.full((rows,), 3, dtype=torch.int32, device="cuda")
    request = torch.arange(rows, device="cuda") // branches
    whole_tables = torch.cat([tables[request], own_pages], dim=1)
    scale = head_size**-0.5

    def ours(copy: int) -> torch.Tensor:
        return tree_attention(
            query,
            keys[copy * pages_per_copy :],
            values[copy * pages_per_copy :],
            tables,
            starts,
            shared_lens,
            own_pages,
            own_lens,
            scale=scale,
            max_shared_len=context,
            max_rows=branches,
        )

    ways: dict[str, Callable[[int], torch.Tensor]] = {"ours": ours}
    missing = {}
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        one_each = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        seq_lens = shared_lens + own_lens
        fa_version = get_flash_attn_version()
        assert fa_version is not None  # where there is none, the import above fails

        def flash(copy: int) -> torch.Tensor:
            out = flash_attn_varlen_func(
                query,
                keys[copy * pages_per_copy :],
                values[copy * pages_per_copy :],
                max_seqlen_q=1,
                cu_seqlens_q=one_each,
                max_seqlen_k=context + PAGE_SIZE,
                seqused_k=seq_lens,
                softmax_scale=scale,
                causal=True,
                block_table=whole_tables,
                fa_version=fa_version,
            )
            return cast(torch.Tensor, out)  # a pair only if asked for the log-sum-exp

        ways["vllm flash attention"] = flash
    except ImportError as error:
        missing["vllm flash attention"] = str(error)
    try:
        import flashinfer  # pyright: ignore[reportMissingImports]

        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
            2, torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD"
        )
        every_row = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        wrapper.plan(
            [starts, every_row],
            [torch.arange(0, tables.numel() + 1, trunk_pages, dtype=torch.int32, device="cuda"), every_row],
            [tables.flatten(), own_pages.flatten()],
            [torch.full((num_requests,), PAGE_SIZE, dtype=torch.int32, device="cuda"), own_lens],
            heads,
            kv_heads,
            head_size,
            PAGE_SIZE,
            q_data_type=torch.bfloat16,
        )
        ways["flashinfer cascade"] = lambda copy: wrapper.run(query, cache[copy * pages_per_copy :])
    except ImportError as error:
        missing["flashinfer cascade"] = str(error)

    kv_bytes = (num_requests * trunk_pages * PAGE_SIZE + rows * 3) * token_bytes
    floor_us = 1e6 * (kv_bytes + 2 * query.nbytes) / bandwidth
    shape = {"model": model, "requests": num_requests, "context": context, "branches": branches}
    checked = torch.linspace(0, rows - 1, min(rows, 64), device="cuda").long()
    want = attention_of_each_row(query[checked], keys, values, whole_tables[checked], context + 3, scale)
    for name, way in ways.items():
        error = (way(0)[checked].float() - want).abs().max().item()
        if not error <= TOLERANCE:
            raise SystemExit(f"bench_kernels: {name} is off by {error} at {shape}; nothing is timed")
        us = median_us(lambda way=way: [way(copy) for copy in range(copies)]) / copies
        yield {**shape, "way": name, "us": us, "floor_us": floor_us, "of_copy_bandwidth": floor_us / us, "error": error}
    for name, reason in missing.items():
        yield {**shape, "way": name, "not measured": reason}


def attention_of_each_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, length: int, scale: float
) -> torch.Tensor:
    """Dense float32 attention, one row after the other."""
    group = query.shape[1] // keys.shape[2]
    out = []
    for row, table in zip(query.float(), tables.long()):
        k, v = (c[table].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for c in (keys, values))
        out.append(torch.einsum("ht,thd->hd", torch.softmax(torch.einsum("hd,thd->ht", row, k) * scale, -1), v))
    return torch.stack(out)


def bench_pages(num_requests: int) -> dict[str, object]:
    """expand, copy_pages over all layers, and commit of a miss, which undoes it; 24 branches a request."""
    branches = 4 * (NUM_DRAFTS + 1)
    pool = DevicePool.full(num_requests * 1024, "cuda")
    trees = Trees.empty(num_requests, branches, NUM_DRAFTS, PAGE_SIZE, 600, "cuda")

    def ints(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    reserve(pool, trees, ints([8199] * num_requests))
    candidates = torch.arange(branches, device="cuda").int().repeat(num_requests, NUM_DRAFTS + 1, 1)
    arguments = (
        ints([8192 + 7] * num_requests),
        ints([[-1] * NUM_DRAFTS] * num_requests),
        candidates,
        ints([[4] * (NUM_DRAFTS + 1)] * num_requests),
        ints([[0, NUM_DRAFTS + 1]] * num_requests),
    )
    layers = [
        torch.zeros(len(pool.holders), PAGE_SIZE, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2 * LAYERS)
    ]
    misses = ints([MISS] * num_requests)

    def grow() -> None:
        expand(pool, trees, *arguments)

    def copy() -> None:
        copy_pages(layers, trees.copy_sources, trees.branch_pages[:, :, 0].contiguous(), trees.copy_lens)

    free = int(pool.num_free)
    grow()
    if int((trees.accept_lengths >= 0).sum()) != num_requests * branches:
        raise SystemExit("bench_kernels: expand left branches out; nothing is timed")
    commit(pool, trees, misses)
    if int(pool.num_free) != free:
        raise SystemExit("bench_kernels: commit did not give every page back; nothing is timed")

    def round_of_pages() -> None:
        grow()
        copy()
        commit(pool, trees, misses)

    return {"requests": num_requests, "branches": branches, "expand+copy+commit_us": median_us(round_of_pages)}


def bench_lookup(num_requests: int) -> dict[str, object]:
    """All requests sample and hit a block of 24 branches, 64 proposal tokens a draft; then 128k logits a draft."""
    branches, top_m = 24, 64
    blocks = DeviceBlocks.empty(num_requests, branches, NUM_DRAFTS, top_m, "cuda")
    for half in (0, 1):
        blocks.headers[:, half] = torch.tensor([2 * half, half - 1, half - 1], device="cuda")
    blocks.outcomes[..., 0], blocks.depths[:] = 0, NUM_DRAFTS
    blocks.outcomes[..., 1] = torch.arange(branches, device="cuda")
    blocks.q_token_ids[:] = torch.arange(top_m, device="cuda")
    blocks.q_probs[:] = 1 / top_m
    verifying = DeviceSpeculation.empty(num_requests, NUM_DRAFTS, top_m, "cuda")
    slots = torch.arange(num_requests, device="cuda")
    ones = torch.ones(num_requests, dtype=torch.int32, device="cuda")
    drafts = torch.zeros(num_requests, 1 + NUM_DRAFTS, dtype=torch.int64, device="cuda")
    outcomes = torch.zeros(num_requests, OUTCOME_COLUMNS + NUM_DRAFTS, dtype=torch.int32, pin_memory=True)
    by_slot = (0 * slots, ones, 0 * slots + 17, ones.float())
    arguments = (blocks, verifying, slots, ones, *by_slot, NUM_DRAFTS, drafts, outcomes)
    lookup(*arguments)
    torch.cuda.synchronize()
    if outcomes[:, 3].tolist() != [17] * num_requests:
        raise SystemExit("bench_kernels: lookup missed; nothing is timed")
    logits = torch.full((num_requests, NUM_DRAFTS, VOCAB_SIZE), -torch.inf, device="cuda")
    columns = torch.zeros(num_requests, NUM_DRAFTS, top_m, dtype=torch.int32, device="cuda")
    of_logits = (logits, columns, verifying, slots, ones.float())
    write_draft_logits(*of_logits)
    if not torch.allclose(logits.softmax(2)[:, :, :top_m], verifying.q_probs):
        raise SystemExit("bench_kernels: the logits are not those of q; nothing is timed")
    return {
        "requests": num_requests,
        "branches": branches,
        "us": median_us(lambda: lookup(*arguments)),
        "write_draft_logits_us": median_us(lambda: write_draft_logits(*of_logits)),
    }


def bench_sample(rows: int) -> dict[str, object]:
    """Llama-3's vocabulary, M = 64, without and with the target's noise; torch.topk alone for comparison."""
    logits = torch.randn(rows, VOCAB_SIZE, dtype=torch.bfloat16, device="cuda")
    positions = torch.arange(rows, device="cuda")
    arguments = (logits, torch.ones(rows, device="cuda"), positions, positions, torch.zeros_like(positions).int())
    draw = functools.partial(sample, *arguments, top_m=64, num_candidates=17)
    foresee = functools.partial(draw, target_seeds=positions, foreseen=torch.ones_like(positions).int())
    drawn = foresee()
    if not torch.equal(logits.gather(1, drawn.q_token_ids.long()), logits.topk(64, dim=-1).values):
        raise SystemExit("bench_kernels: sample did not find the likeliest tokens; nothing is timed")
    noise = hashed_gumbel(positions[:, None], positions[:, None], torch.arange(VOCAB_SIZE, device="cuda"))
    scores = logits.float() + noise
    if not torch.allclose(scores.gather(1, drawn.candidate_ids.long()), scores.topk(17, dim=-1).values):
        raise SystemExit("bench_kernels: sample did not find the best tokens with noise; nothing is timed")
    return {
        "rows": rows,
        "us": median_us(draw),
        "foreseen_us": median_us(foresee),
        "topk_us": median_us(lambda: logits.topk(64, dim=-1)),
    }


if __name__ == "__main__":
    sys.exit(main())
