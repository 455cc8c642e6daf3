"""Copy-on-write of partly filled pages."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import require_contiguous, use_triton


def copy_pages(
    caches: Sequence[torch.Tensor], sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor
) -> None:
    """Copy the first `num_slots[i]` slots of page `sources[i]` to page `destinations[i]`, every cache in one launch.

    caches: views `[P, page_size, num_kv_heads, head_size]` of the keys and of the values of every layer, alike in
    shape, strides and dtype, with unit stride last. sources, destinations, num_slots [n] int32 (any shape of n
    elements); entries of no slots are passed over, whatever their pages. No page is a source and a destination in one
    call. The bits are copied: NaN and every dtype survive.
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
        block_row = triton.next_power_of_2(num_heads * head_size)
        block_slots = max(1, min(triton.next_power_of_2(page_size), 4096 // block_row))
        _copy_pages_kernel[(sources.numel(), len(caches), triton.cdiv(page_size, block_slots))](
            _pointers(tuple(cache.data_ptr() for cache in caches), like.device),
            sources,
            destinations,
            num_slots,
            *like.stride()[:3],
            ELEMENT=getattr(tl, f"int{8 * like.element_size()}"),
            NUM_HEADS=num_heads,
            HEAD=head_size,
            BLOCK_SLOTS=block_slots,
            BLOCK_ROW=block_row,
        )


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
    ELEMENT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """One program a copy, a cache and a run of `BLOCK_SLOTS` slots."""
    i = tl.program_id(0)
    slot = tl.program_id(2) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    num_slots = tl.load(num_slots_ptr + i)
    if tl.program_id(2) * BLOCK_SLOTS >= num_slots:
        return
    cache = tl.load(caches_ptr + tl.program_id(1)).to(tl.pointer_type(ELEMENT))
    source = tl.load(sources_ptr + i).to(tl.int64) * stride_page
    destination = tl.load(destinations_ptr + i).to(tl.int64) * stride_page
    element = tl.arange(0, BLOCK_ROW)
    inside = slot[:, None] * stride_slot + (element // HEAD * stride_head + element % HEAD)[None, :]
    mask = (slot < num_slots)[:, None] & (element < NUM_HEADS * HEAD)[None, :]
    tl.store(cache + destination + inside, tl.load(cache + source + inside, mask=mask), mask=mask)
