"""Attention of all branches in one step, reading each request's shared trunk once, and each branch's own pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_ssd.kernels.dispatch import power_of_2, require_contiguous, use_triton

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 64
MIN_BLOCKS = 4
"""Fewest blocks of context per program; if a trunk is too short for all programs, the others exit."""
MAX_TILE = 128
"""Largest M dimension of a tile: a request's queries times the query heads per KV head."""
PROGRAMS_PER_PROCESSOR = 2
"""Trunk programs that a multiprocessor runs concurrently."""


def tree_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    shared_lens: torch.Tensor,
    own_pages: torch.Tensor,
    own_lens: torch.Tensor,
    *,
    scale: float,
    max_shared_len: int,
    max_rows: int,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `B` query tokens over paged KV -> `[B, num_heads, head_size]`, written to `out` if given.

    query [B, num_heads, head_size]; key_cache, value_cache [P, page_size, num_kv_heads, head_size]: views with any
    strides but unit stride in the last axis, which already contain the KV of the queries themselves.
    page_tables [R, W] int32: trunk pages of each request; query_start_loc [R + 1] int32: its query tokens.
    shared_lens [B] int32: leading trunk slots that each query reads; own_pages [B, Q] int32 and own_lens [B] int32:
    the pages after those, and how many of their slots it reads. A query's position is shared_lens + own_lens - 1.

    A branch reads the trunk up to the page of its base and owns the rest. A spine token owns nothing and reads the
    trunk up to itself, so prompts can be part of the batch. A query of length 0 gets zeros. sliding_window: number of
    last positions to read, 0 for all; soft_cap: logits become soft_cap * tanh(logits / soft_cap), 0 for none.
    Tokens after those of the last request are padding of length 0. The launch is sized by max_shared_len and max_rows,
    bounds on shared_lens and on a request's queries, and by num_splits (at most 64). Loose bounds are fine: programs
    without work exit at once.
    """
    if out is None:
        out = torch.empty_like(query)
    arguments = (query, key_cache, value_cache, page_tables, query_start_loc, shared_lens, own_pages, own_lens)
    if not use_triton(query):
        out.copy_(_tree_attention_reference(*arguments, scale, sliding_window, soft_cap))
        return out
    if not query.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(f"queries are {query.dtype}, the cache is {key_cache.dtype}, {value_cache.dtype}")
    require_contiguous(query_start_loc, shared_lens, own_lens)
    num_rows, num_heads, head_size = query.shape
    num_requests = len(page_tables)
    _, page_size, num_kv_heads, _ = key_cache.shape
    if not num_rows:
        return out
    group = num_heads // num_kv_heads
    # The rows of a request and the query heads of one KV head form the M dimension of a tensor-core dot.
    # Float32 has no tensor cores of its precision: small tiles and blocks keep its multiplications in registers.
    is_half = query.dtype.itemsize == 2
    block_d = power_of_2(head_size)
    block_m = min(max(power_of_2(max_rows * group), 16), min(MAX_TILE, 16384 // block_d) if is_half else 16)
    block_m = max(block_m, power_of_2(group))
    rows_per_tile = block_m // group
    block_t = (64 if block_d <= 128 else 32) if is_half else 16
    num_tiles = num_rows // rows_per_tile + num_requests  # at least one more than whole tiles in every request
    if num_splits is None:
        num_live = live_tiles(num_rows, num_requests, rows_per_tile) * num_kv_heads
        num_splits = splits(num_live, triton.cdiv(max_shared_len, block_t), _num_processors(query.device))
    elif num_splits > MAX_SPLITS:
        raise ValueError(f"num_splits must be at most {MAX_SPLITS}, not {num_splits}")
    partial = torch.empty(num_rows, num_heads, num_splits, head_size, dtype=torch.float32, device=query.device)
    lse = torch.empty(num_rows, num_heads, num_splits, dtype=torch.float32, device=query.device)
    common = dict(
        GROUP=group,
        HEAD=head_size,
        BLOCK_D=block_d,
        PAGE_SIZE=page_size,
        SLIDING_WINDOW=sliding_window,
        SOFT_CAP=soft_cap,
        PRECISION="tf32" if is_half else "ieee",
    )
    _trunk_kernel[(num_tiles, num_kv_heads, num_splits)](
        *arguments[:6],
        own_lens,
        partial,
        lse,
        num_requests,
        scale,
        *query.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        page_tables.stride(0),
        ROWS=rows_per_tile,
        BLOCK_M=block_m,
        BLOCK_T=block_t,
        MIN_BLOCKS=MIN_BLOCKS,
        num_warps=8 if block_m * block_d >= 128 * 128 else 4,
        num_stages=3 if block_d <= 128 else 2,
        **common,
    )
    _merge_kernel[(num_rows, num_kv_heads)](
        query,
        key_cache,
        value_cache,
        shared_lens,
        own_pages,
        own_lens,
        partial,
        lse,
        out,
        scale,
        *query.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        own_pages.stride(0),
        *out.stride()[:2],
        num_splits,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_M=max(16, power_of_2(group)),
        BLOCK_T=32 if is_half else 16,
        **common,
    )
    return out


def live_tiles(num_rows: int, num_requests: int, rows_per_tile: int) -> int:
    """Tiles that have work when every request has as many rows, which is what a budget of branches aims at."""
    return num_requests * triton.cdiv(triton.cdiv(num_rows, num_requests), rows_per_tile)


def splits(num_programs: int, num_blocks: int, num_processors: int) -> int:
    """Runs of context that a trunk is cut into, so that all programs run at once and few processors are idle."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors // num_programs
    return max(1, min(wanted, triton.cdiv(num_blocks, MIN_BLOCKS), MAX_SPLITS))


def _num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere few, since the interpreter runs programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _tree_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    shared_lens: torch.Tensor,
    own_pages: torch.Tensor,
    own_lens: torch.Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
) -> torch.Tensor:
    """Request by request, so that a prompt of thousands of tokens takes no copy of the trunk for each of them."""
    page_size, starts = key_cache.shape[1], query_start_loc.tolist()
    grouped = query.float().unflatten(1, (key_cache.shape[2], -1))
    attended = torch.zeros_like(grouped)
    for r, (first, last) in enumerate(zip(starts, starts[1:])):
        if first == last:
            continue
        rows, shared, own = slice(first, last), shared_lens[first:last, None], own_lens[first:last, None]
        slot = torch.arange(int(shared.max()), device=query.device)
        own_slot = torch.arange(int(own.max()), device=query.device)
        page = page_tables[r][slot // page_size].expand(last - first, -1)
        own_page = own_pages[rows][:, own_slot // page_size]
        in_trunk, in_own = slot < shared, own_slot < own
        if sliding_window:
            in_trunk = in_trunk & (slot >= shared + own - sliding_window)
            in_own = in_own & (own_slot >= own - sliding_window)
        read = torch.cat([in_trunk, in_own], 1)[:, None, None]
        in_trunk = in_trunk.any(0, keepdim=True)  # that any row reads: the others hold anything
        trunk, own_part = (page[:1], slot % page_size, in_trunk), (own_page, own_slot % page_size, in_own)
        keys, own_keys = (_read_slots(key_cache, *part) for part in (trunk, own_part))
        values, own_values = (_read_slots(value_cache, *part) for part in (trunk, own_part))
        logits = torch.cat(
            [
                torch.einsum("bkgd,tkd->bkgt", grouped[rows], keys[0]),
                torch.einsum("bkgd,btkd->bkgt", grouped[rows], own_keys),
            ],
            -1,
        )
        logits = logits * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        weights = torch.softmax(logits.masked_fill(~read, float("-inf")), -1).masked_fill(~read, 0)
        of_trunk, of_own = weights.split([len(slot), len(own_slot)], -1)
        attended[rows] = torch.einsum("bkgt,tkd->bkgd", of_trunk, values[0])
        attended[rows] += torch.einsum("bkgt,btkd->bkgd", of_own, own_values)
    return attended.flatten(1, 2).to(query.dtype)


def _read_slots(cache: torch.Tensor, page: torch.Tensor, offset: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Keys or values `[rows, slots, num_kv_heads, head_size]` float32; 0 where not read."""
    return cache[page.masked_fill(~read, 0), offset].float().masked_fill(~read[..., None, None], 0)


@triton.jit
def _load_slots(head_ptr, slots, inside, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys or values [T, D] of one head at element offsets `slots` [T] int64; 0 where not inside."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(head_ptr + slots[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < HEAD), other=0.0)


@triton.jit
def _attend(
    query,
    keys,
    values,
    seen,
    scale,
    largest,
    total,
    weighted,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of online softmax in base 2: query [M, D], keys and values [T, D], seen [M, T]."""
    logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if SOFT_CAP > 0:
        logits = SOFT_CAP * (1 - 2 / (1 + tl.exp(2 * logits / SOFT_CAP)))
    logits = tl.where(seen, logits * LOG2_E, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, 1))
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # nothing seen yet: no -inf minus -inf
    weights = tl.exp2(logits - shift[:, None])
    rescale = tl.exp2(largest - shift)
    total = total * rescale + tl.sum(weights, 1)
    weighted = weighted * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return new_largest, total, weighted


@triton.jit(do_not_specialize=["num_requests"])
def _trunk_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    page_tables_ptr,
    query_start_loc_ptr,
    shared_lens_ptr,
    own_lens_ptr,
    partial_ptr,
    lse_ptr,
    num_requests,
    scale,
    query_stride_row,
    query_stride_head,
    key_stride_page,
    key_stride_slot,
    key_stride_head,
    value_stride_page,
    value_stride_slot,
    value_stride_head,
    table_stride,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
):
    """One program a tile of `ROWS` queries of one request, a KV head and a run of the trunk.

    Tiles are numbered so that request i starts at tile query_start_loc[i] // ROWS + i: numbers that a request does
    not need are left over, and no program needs to know how many rows the others have.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    low, high = 0, num_requests
    while low < high:  # the last request that starts at this tile or before
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // ROWS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    first_row = tl.load(query_start_loc_ptr + request)
    last_row = tl.load(query_start_loc_ptr + request + 1)
    first_row += (tile - (first_row // ROWS + request)) * ROWS
    if first_row >= last_row:
        return

    m = tl.arange(0, BLOCK_M)
    row = first_row + m // GROUP
    valid = (row < last_row) & (m < ROWS * GROUP)
    head = kv_head * GROUP + m % GROUP
    row = row.to(tl.int64)
    shared_len = tl.load(shared_lens_ptr + row, mask=valid, other=0)
    begin = tl.zeros_like(shared_len)
    if SLIDING_WINDOW > 0:
        own_len = tl.load(own_lens_ptr + row, mask=valid, other=0)
        begin = tl.maximum(shared_len + own_len - SLIDING_WINDOW, 0)
    end = tl.max(shared_len, 0)
    start = tl.minimum(tl.min(tl.where(shared_len > 0, begin, end), 0), end) // BLOCK_T
    per_split = tl.maximum(tl.cdiv(tl.cdiv(end, BLOCK_T) - start, num_splits), MIN_BLOCKS)
    start = (start + split * per_split) * BLOCK_T
    end = tl.minimum(end, start + per_split * BLOCK_T)
    at = (row * (tl.num_programs(1) * GROUP) + head) * num_splits + split
    if start >= end:
        tl.store(lse_ptr + at, float("-inf"), mask=valid)
        return

    d = tl.arange(0, BLOCK_D)
    query = tl.load(
        query_ptr + row[:, None] * query_stride_row + head[:, None] * query_stride_head + d[None, :],
        mask=valid[:, None] & (d[None, :] < HEAD),
        other=0.0,
    )
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = page_tables_ptr + request.to(tl.int64) * table_stride
    for block in range(start, end, BLOCK_T):
        position = block + tl.arange(0, BLOCK_T)
        inside = position < end
        page = tl.load(table + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        offset = (position % PAGE_SIZE).to(tl.int64)
        key_slots = page * key_stride_page + offset * key_stride_slot
        value_slots = page * value_stride_page + offset * value_stride_slot
        keys = _load_slots(key_ptr + kv_head * key_stride_head, key_slots, inside, HEAD, BLOCK_D)
        values = _load_slots(value_ptr + kv_head * value_stride_head, value_slots, inside, HEAD, BLOCK_D)
        seen = (position[None, :] >= begin[:, None]) & (position[None, :] < shared_len[:, None])
        largest, total, weighted = _attend(
            query, keys, values, seen, scale, largest, total, weighted, SOFT_CAP, PRECISION
        )

    tl.store(lse_ptr + at, largest + tl.log2(total), mask=valid)  # -inf where nothing was seen
    tl.store(
        partial_ptr + at[:, None] * HEAD + d[None, :],
        weighted / tl.where(total > 0, total, 1.0)[:, None],
        mask=valid[:, None] & (d[None, :] < HEAD),
    )


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    shared_lens_ptr,
    own_pages_ptr,
    own_lens_ptr,
    partial_ptr,
    lse_ptr,
    out_ptr,
    scale,
    query_stride_row,
    query_stride_head,
    key_stride_page,
    key_stride_slot,
    key_stride_head,
    value_stride_page,
    value_stride_slot,
    value_stride_head,
    own_stride,
    out_stride_row,
    out_stride_head,
    num_splits,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a query token and a KV head: its own pages, then the runs of the trunk, merged by log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + m
    valid = m < GROUP
    own_len = tl.load(own_lens_ptr + row)
    begin = 0
    if SLIDING_WINDOW > 0:
        begin = tl.maximum(own_len - SLIDING_WINDOW, 0)
    query = tl.load(
        query_ptr + row * query_stride_row + head[:, None] * query_stride_head + d[None, :],
        mask=valid[:, None] & (d[None, :] < HEAD),
        other=0.0,
    )
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(begin, own_len, BLOCK_T):
        slot = block + tl.arange(0, BLOCK_T)
        inside = slot < own_len
        page = tl.load(own_pages_ptr + row * own_stride + slot // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        offset = (slot % PAGE_SIZE).to(tl.int64)
        key_slots = page * key_stride_page + offset * key_stride_slot
        value_slots = page * value_stride_page + offset * value_stride_slot
        keys = _load_slots(key_ptr + kv_head * key_stride_head, key_slots, inside, HEAD, BLOCK_D)
        values = _load_slots(value_ptr + kv_head * value_stride_head, value_slots, inside, HEAD, BLOCK_D)
        largest, total, weighted = _attend(
            query, keys, values, inside[None, :], scale, largest, total, weighted, SOFT_CAP, PRECISION
        )

    # The largest log-sum-exp first: then the runs add up independently of each other and their loads overlap.
    # A row that reads no trunk may be padding, which no program of the trunk has seen.
    at = (row * (tl.num_programs(1) * GROUP) + head) * num_splits
    written = valid & (tl.load(shared_lens_ptr + row) > 0)
    run = tl.arange(0, MAX_SPLITS)
    lse = tl.load(
        lse_ptr + at[:, None] + run[None, :], mask=written[:, None] & (run[None, :] < num_splits), other=float("-inf")
    )
    new_largest = tl.maximum(largest, tl.max(lse, 1))
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    rescale = tl.exp2(largest - shift)
    total = total * rescale + tl.sum(tl.exp2(lse - shift[:, None]), 1)
    weighted = weighted * rescale[:, None]
    for split in tl.range(num_splits, loop_unroll_factor=4):
        split_lse = tl.load(lse_ptr + at + split, mask=written, other=float("-inf"))
        weight = tl.exp2(split_lse - shift)
        partial = tl.load(
            partial_ptr + (at + split)[:, None] * HEAD + d[None, :],
            mask=(split_lse > float("-inf"))[:, None] & (d[None, :] < HEAD),
            other=0.0,
        )
        weighted += partial * weight[:, None]
    attended = weighted / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out_ptr + row * out_stride_row + head[:, None] * out_stride_head + d[None, :],
        attended.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (d[None, :] < HEAD),
    )
