"""The batch sizes that a drafter captures its steps for."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_ssd.drafter.buckets import FINE_ROWS, MAX_BRANCHES, MAX_ROWS, ROWS_PER_REQUEST, Buckets, row_sizes

K = 5
PER_REQUEST = 25 + K + 1
"""24 branches, one just in time, and a spine of K + 1 tokens."""


@pytest.mark.parametrize(("max_num_seqs", "most"), [(1, 4), (8, 24), (64, 56), (256, 64), (1024, 64)])
def test_how_many_there_are(max_num_seqs, most):
    """Each takes a capture at start and a megabyte or two."""
    sizes = Buckets(max_num_seqs, PER_REQUEST).all
    print(f"max_num_seqs {max_num_seqs}: {len(sizes)} buckets")
    assert len(set(sizes)) == len(sizes) <= most


@pytest.mark.parametrize("most_rows", [4, 8, 100, 512, 880])
@pytest.mark.parametrize("max_num_seqs", [1, 8, 256])
def test_none_is_larger_than_its_memory(max_num_seqs, most_rows):
    buckets = Buckets(max_num_seqs, PER_REQUEST, most_rows)
    assert all(size.rows <= max(most_rows, 8) for size in buckets.all)
    fits = min(max_num_seqs * PER_REQUEST, 3 * most_rows // 4)
    assert all(buckets.find(rows, 1) for rows in range(1, min(fits, PER_REQUEST) + 1))


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 64, 100])
def test_every_batch_has_a_bucket_with_little_padding(max_num_seqs):
    buckets = Buckets(max_num_seqs, PER_REQUEST)
    known, largest = set(buckets.all), buckets.largest
    for requests in range(1, max_num_seqs + 1):
        for rows in range(requests, min(requests * PER_REQUEST, MAX_ROWS) + 1):
            size = buckets.find(rows, requests)
            assert size in known and size.rows <= largest.rows and size.requests <= largest.requests
            assert rows <= size.rows and requests <= size.requests < 2 * requests
            least = max(rows, min(ROWS_PER_REQUEST * size.requests, MAX_ROWS), 8)
            assert size.rows - least < max(8, size.rows // (5 if size.rows > FINE_ROWS else 3) + 1), (
                rows,
                requests,
                size,
            )
        assert buckets.find(MAX_ROWS + 1, requests) is None


def test_an_hour_of_serving_needs_no_other_bucket():
    """Joins and leaves, hits with one spine token, misses with up to K + 1, waves of branches; rounds of 15 ms."""
    rng = np.random.default_rng(0)
    for max_num_seqs in (8, 64):
        buckets = Buckets(max_num_seqs, PER_REQUEST)
        known, requests, missing = set(buckets.all), 1, 0
        for _ in range(240_000 // 4):  # four rounds look alike
            requests = int(np.clip(requests + rng.integers(-1, 2), 1, max_num_seqs))
            branches = min(int(rng.integers(1, 25)), MAX_BRANCHES // requests)
            spine_tokens = requests + K * int(rng.binomial(requests, 0.3))
            for rows in (requests * branches, requests * branches + spine_tokens, spine_tokens):
                size = buckets.find(rows, requests)
                missing += size is None
                assert size is None or size in known
        assert missing == 0


def test_row_sizes_grow_geometrically():
    sizes = row_sizes(MAX_ROWS)
    assert sizes[:8] == [8, 16, 24, 32, 48, 64, 96, 128] and sizes[-1] == MAX_ROWS
    assert row_sizes(20) == [8, 16, 24] and row_sizes(1) == [8]
    assert all(one < other <= 1.5 * one for one, other in zip(sizes[1:], sizes[2:]))
