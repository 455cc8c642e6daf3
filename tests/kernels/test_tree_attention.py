"""Tree attention against a dense softmax over each query's own keys; pages nobody owns hold NaN."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cases import DEVICE, ints, reference

from vllm_ssd.kernels import tree_attention


@dataclass(frozen=True)
class Shape:
    """rows [R]: of each request, (trunk slots read, own slots read) of each of its queries."""

    rows: list[list[tuple[int, int]]]
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    sliding_window: int = 0
    soft_cap: float = 0.0
    num_splits: int | None = None


def branches(trunk: int, page_size: int, *own: int) -> list[tuple[int, int]]:
    """Branches from the last whole page of a trunk."""
    return [(trunk // page_size * page_size, trunk % page_size + n) for n in own]


SHAPES = {
    "ragged requests": Shape([branches(75, 16, 1, 2, 3, 6, 6), branches(130, 16, 4), branches(33, 16, *range(1, 8))]),
    "branch crosses a page": Shape([branches(47, 16, 1, 2, 17, 18)]),
    "trunk of one token": Shape([[(0, 1), (0, 2), (0, 5)]]),
    "trunk without own pages": Shape([[(50, 0), (17, 0)]]),
    "prompt beside branches": Shape([[(n, 0) for n in range(1, 40)], branches(40, 16, 3, 3)]),
    "different trunk lengths in one request": Shape([[(16, 9), (32, 1), (48, 2), (64, 1)]]),
    "dead rows": Shape([[(0, 0), (32, 4), (0, 0)], [(0, 0)], branches(21, 16, 1)]),
    "request without rows": Shape([[], branches(21, 16, 1, 2), []]),
    "empty batch": Shape([]),
    "one head per group": Shape([branches(70, 16, 1, 2)], heads=3, kv_heads=3),
    "group of seven": Shape([branches(70, 16, *range(1, 12))], heads=14, kv_heads=2),
    "more rows than a tile": Shape([branches(90, 16, *[1, 4] * 20), branches(30, 16, 2)], heads=8, kv_heads=1),
    "head size 80": Shape([branches(70, 16, 1, 2)], head_size=80),
    "head size 96": Shape([branches(70, 16, 1, 2)], head_size=96),
    "head size 128": Shape([branches(70, 16, 1, 2)], head_size=128),
    "head size 256": Shape([branches(70, 16, 1, 2)], head_size=256, heads=4),
    "page size 32": Shape([branches(100, 32, 1, 2)], page_size=32),
    "page size 128": Shape([branches(300, 128, 1, 130)], page_size=128),
    "odd page size": Shape([branches(100, 17, 1, 2)], page_size=17),
    "window": Shape([branches(200, 16, 1, 9), branches(20, 16, 1)], sliding_window=37),
    "window inside own pages": Shape([branches(75, 16, 9, 17), branches(160, 16, 1)], sliding_window=5),
    "window in prompts": Shape([[(n, 0) for n in range(1, 90, 3)]], sliding_window=16),
    "soft cap": Shape([branches(75, 16, 1, 2)], soft_cap=5.0),
    "soft cap and window": Shape([branches(75, 16, 1, 2)], soft_cap=2.0, sliding_window=30),
    "one split": Shape([branches(200, 16, 1, 2)], num_splits=1),
    "more splits than blocks": Shape([branches(200, 16, 1, 2), branches(20, 16, 3)], num_splits=7),
    "most splits": Shape([branches(900, 16, 1, 2), branches(20, 16, 3), [(0, 2)]], num_splits=64),
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # wrong when interpreted


def make_case(shape: Shape, dtype: torch.dtype):
    """Arguments of `tree_attention` in shuffled pages; all that no query reads is NaN."""
    torch.manual_seed(0)
    page_size = shape.page_size
    rows = [row for of_request in shape.rows for row in of_request]
    pages_of = [-(-max((shared for shared, _ in of_request), default=0) // page_size) for of_request in shape.rows]
    own_of = [-(-own // page_size) for _, own in rows]
    num_pages = sum(pages_of) + sum(own_of) + 3
    order = torch.randperm(num_pages, dtype=torch.int32)
    tables = torch.full((len(shape.rows), max(pages_of, default=0) + 2), num_pages - 1, dtype=torch.int32)
    own_pages = torch.full((len(rows), max(own_of, default=0) + 1), num_pages - 1, dtype=torch.int32)
    caches = torch.full((num_pages, 2, page_size, shape.kv_heads, shape.head_size), float("nan"), dtype=dtype)
    tables[:], own_pages[:] = order[-1], order[-1]  # a page that nobody owns
    for r, n in enumerate(pages_of):
        tables[r, :n], order = order[:n], order[n:]
        fill(caches, tables[r], max((shared for shared, _ in shape.rows[r]), default=0))
    for i, n in enumerate(own_of):
        own_pages[i, :n], order = order[:n], order[n:]
        fill(caches, own_pages[i], rows[i][1])
    query = torch.randn(len(rows), shape.heads, shape.head_size).to(dtype)
    starts = torch.tensor([0, *[len(of_request) for of_request in shape.rows]]).cumsum(0).int()
    shared_lens, own_lens = ints([shared for shared, _ in rows]), ints([own for _, own in rows])
    return query, *caches.unbind(1), tables, starts, shared_lens, own_pages, own_lens


def fill(caches: torch.Tensor, table: torch.Tensor, num_slots: int) -> None:
    """Random keys and values in the first slots of a page table."""
    slot = torch.arange(num_slots)
    page, offset = table[slot // caches.shape[2]].long(), slot % caches.shape[2]
    caches[page, :, offset] = torch.randn(num_slots, 2, *caches.shape[3:]).to(caches.dtype)


def options(shape: Shape) -> dict:
    return dict(
        scale=shape.head_size**-0.5,
        max_shared_len=max((shared for rows in shape.rows for shared, _ in rows), default=0),
        max_rows=max((len(rows) for rows in shape.rows), default=0),
        sliding_window=shape.sliding_window,
        soft_cap=shape.soft_cap,
        num_splits=shape.num_splits,
    )


def dense(shape: Shape, query, keys, values, tables, starts, shared_lens, own_pages, own_lens) -> torch.Tensor:
    """Attention written out, one query and one head after the other, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    request = torch.repeat_interleave(torch.arange(len(tables)), starts.diff())
    for i in range(len(query)):
        shared, own = int(shared_lens[i]), int(own_lens[i])
        trunk_slot, own_slot = torch.arange(shared), torch.arange(own)
        page = torch.cat(
            [tables[request[i], trunk_slot // shape.page_size], own_pages[i, own_slot // shape.page_size]]
        ).long()
        offset = torch.cat([trunk_slot, own_slot]) % shape.page_size
        seen = slice(max(shared + own - shape.sliding_window, 0) if shape.sliding_window else 0, None)
        for head in range(shape.heads if shared + own else 0):
            kv_head = head * shape.kv_heads // shape.heads
            logits = keys[page, offset, kv_head][seen].double() @ query[i, head].double() * shape.head_size**-0.5
            if shape.soft_cap:
                logits = shape.soft_cap * torch.tanh(logits / shape.soft_cap)
            out[i, head] = torch.softmax(logits, 0) @ values[page, offset, kv_head][seen].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_tree_attention(name, dtype):
    shape = SHAPES[name]
    case = make_case(shape, dtype)
    want = dense(shape, *case)
    with reference():
        referred = tree_attention(*case, **options(shape))
    got = tree_attention(*(argument.to(DEVICE) for argument in case), **options(shape))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(referred.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.cpu().double(), want, atol=tolerance, rtol=tolerance)


def test_the_reference_makes_its_tensors_where_its_arguments_are():
    """So that it runs on a GPU as well: what it made on the default device here would not mix with them."""
    shape = SHAPES["ragged requests"]
    case = make_case(shape, torch.float32)
    with reference():
        want = tree_attention(*case, **options(shape))
        with torch.device("meta"):
            assert torch.arange(1).is_meta
            assert torch.equal(tree_attention(*case, **options(shape)), want)


def test_any_strides_and_a_given_output():
    """vLLM hands over queries cut from a wider projection, and caches with heads outside slots."""
    shape = SHAPES["ragged requests"]
    query, keys, values, *rest = make_case(shape, torch.float32)
    wide = torch.cat([query, query], dim=2).to(DEVICE)[..., : shape.head_size]
    keys, values = (c.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE) for c in (keys, values))
    out = torch.full((len(query), shape.heads, 2 * shape.head_size), 7.0, device=DEVICE)
    rest = [argument.to(DEVICE) for argument in rest]
    got = tree_attention(wide, keys, values, *rest, **options(shape), out=out[..., : shape.head_size])
    assert not wide.is_contiguous() and not keys.is_contiguous()
    want = tree_attention(wide.contiguous(), keys.contiguous(), values.contiguous(), *rest, **options(shape))
    assert torch.equal(got, want)
    assert (out[..., shape.head_size :] == 7).all()


def test_padding_after_the_last_request():
    """Rows of no request, as in a graph for larger batches; nobody writes their part of the trunk's results."""
    shape = SHAPES["ragged requests"]
    query, keys, values, tables, starts, shared_lens, own_pages, own_lens = make_case(shape, torch.float32)
    num_rows, padding = len(query), 5

    def padded(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, torch.zeros_like(rows[:1]).expand(padding, *rows.shape[1:])])

    tables, starts = torch.cat([tables, tables[:1]]), torch.cat([starts, starts[-1:]])  # and a request without rows
    case = padded(query), keys, values, tables, starts, padded(shared_lens), padded(own_pages), padded(own_lens)
    bounds = options(shape) | {"max_shared_len": 4096, "num_splits": 8}
    want = dense(shape, query, keys, values, tables[:-1], starts[:-1], shared_lens, own_pages, own_lens)
    for got in (run_reference(case, bounds), tree_attention(*(argument.to(DEVICE) for argument in case), **bounds)):
        torch.testing.assert_close(got[:num_rows].cpu().double(), want, atol=1e-5, rtol=1e-5)
        assert (got[num_rows:] == 0).all()


def run_reference(case, bounds) -> torch.Tensor:
    with reference():
        return tree_attention(*case, **bounds)


def test_too_many_splits_are_refused():
    case = [argument.to(DEVICE) for argument in make_case(SHAPES["one split"], torch.float32)]
    with pytest.raises(ValueError, match="at most 64, not 65"):
        tree_attention(*case, **options(SHAPES["one split"]) | {"num_splits": 65})


def test_cache_of_another_dtype_is_refused():
    query, keys, values, *rest = (argument.to(DEVICE) for argument in make_case(SHAPES["soft cap"], torch.float32))
    with pytest.raises(ValueError, match="queries are torch.float32"):
        tree_attention(query, keys.half(), values.half(), *rest, **options(SHAPES["soft cap"]))
