"""Copy-on-write of partly filled pages."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import require_contiguous, use_triton


def copy_pages(
    caches: Sequence[torch.Tensor], sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor
) -> None:
    """Copy the first `num_slots[i]` slots of page `sources[i]` to page `destinations[i]`, every cache in one launch.

    caches: views `[P, page_size, num_kv_heads, head_size]` of the keys and of the values of every layer, with equal
    shape, strides and dtype, and unit stride in the last axis. sources, destinations, num_slots: int32, any shape of n
    elements; entries with num_slots 0 are skipped, whatever their pages. No page may be both a source and a destination
    in one call. Copies bits, so NaN and every dtype are preserved.
    """
    if not use_triton(sources):
        _copy_pages_reference(caches, sources, destinations, num_slots)
        return
    require_contiguous(sources, destinations, num_slots)
    like = caches[0]
    _, page_size, num_heads, head_size = like.shape
    for cache in caches:
        if cache.shape != like.shape or cache.stride() != like.stride() or cache.dtype != like.dtype:
            raise ValueError("the caches of all layers must agree in shape, strides and dtype")
    if like.stride(3) != 1:
        raise ValueError(f"the last axis of a cache must have unit stride, not {like.stride(3)}")
    if sources.numel():
        addresses, size = tuple(cache.data_ptr() for cache in caches), like.element_size()
        word = _word_bytes(*(size * stride for stride in like.stride()[:3]), size * head_size, *addresses)
        head_words = size * head_size // word
        block_row = triton.next_power_of_2(num_heads * head_words)
        block_slots = max(1, min(triton.next_power_of_2(page_size), 2048 // block_row))
        _copy_pages_kernel[(sources.numel(), len(caches), triton.cdiv(page_size, block_slots))](
            _pointers(addresses, like.device),
            sources,
            destinations,
            num_slots,
            *(size * stride // word for stride in like.stride()[:3]),
            WORD=getattr(tl, f"int{8 * word}"),
            ALIGNED=math.gcd(16, *addresses),
            NUM_HEADS=num_heads,
            HEAD=head_words,
            BLOCK_SLOTS=block_slots,
            BLOCK_ROW=block_row,
        )


def _word_bytes(*multiples: int) -> int:
    """The largest word size, at most 8 bytes, that divides all sizes and addresses."""
    return math.gcd(8, *multiples)


@functools.lru_cache(maxsize=8)
def _pointers(addresses: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _copy_pages_reference(
    caches: Sequence[torch.Tensor], sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor
) -> None:
    copies = zip(sources.flatten().tolist(), destinations.flatten().tolist(), num_slots.flatten().tolist())
    for source, destination, n in copies:
        for cache in caches if n else ():
            cache[destination, :n] = cache[source, :n]


@triton.jit
def _copy_pages_kernel(
    caches_ptr,
    sources_ptr,
    destinations_ptr,
    num_slots_ptr,
    stride_page,
    stride_slot,
    stride_head,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """One program a copy, a cache and a run of `BLOCK_SLOTS` slots; all is counted in words, two to a load."""
    i = tl.program_id(0)
    slot = tl.program_id(2) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    num_slots = tl.load(num_slots_ptr + i)
    if tl.program_id(2) * BLOCK_SLOTS >= num_slots:
        return
    cache = tl.multiple_of(tl.load(caches_ptr + tl.program_id(1)).to(tl.pointer_type(WORD)), ALIGNED)
    source = tl.load(sources_ptr + i).to(tl.int64) * stride_page
    destination = tl.load(destinations_ptr + i).to(tl.int64) * stride_page
    element = tl.arange(0, BLOCK_ROW)
    inside = slot[:, None] * stride_slot + (element // HEAD * stride_head + element % HEAD)[None, :]
    mask = (slot < num_slots)[:, None] & (element < NUM_HEADS * HEAD)[None, :]
    tl.store(cache + destination + inside, tl.load(cache + source + inside, mask=mask), mask=mask)
