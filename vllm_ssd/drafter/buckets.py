"""The batch sizes that steps are captured for."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

MAX_ROWS = 1024
"""Rows of the largest bucket. A step of more takes longer than its launches, and its logits hundreds of megabytes."""
MAX_BRANCHES = 3 * MAX_ROWS // 4
"""Branches of all requests together; the spine tokens that ride with their steps fill the largest bucket."""
FINE_ROWS = 256
"""Padding is free while weights take longer to read than to use, about to so many rows; beyond, sizes lie closer."""
ROWS_PER_REQUEST = 4
"""Rows for which a bucket has room at least for each of its requests: fewer are padded."""


@dataclass(frozen=True, slots=True)
class BucketSize:
    """Room for `rows` of `requests`, of which none has more than `rows_per_request`."""

    rows: int
    requests: int
    rows_per_request: int


class Buckets:
    """Sizes for up to `max_num_seqs` requests of up to `rows_per_request` rows each, in ascending order.

    most_rows: what memory for logits was kept for; no size but the smallest has more

    Requests are rounded up to a power of two; rows to multiples of it by 1 or 1.5 up to `FINE_ROWS`, of 1, 1.25, 1.5 or
    1.75 above. Contexts of any length share them.
    """

    def __init__(self, max_num_seqs: int, rows_per_request: int, most_rows: int = MAX_ROWS) -> None:
        self._rows: dict[int, list[int]] = {}  # by requests
        self._rows_per_request = rows_per_request
        largest = max(min(most_rows, MAX_ROWS), 8)
        requests = 1
        while requests < 2 * max_num_seqs and requests <= largest:
            most = min(requests * rows_per_request, largest)
            least = min(max(ROWS_PER_REQUEST * requests, 8), largest)
            sizes = [rows for rows in row_sizes(max(most, least)) if rows <= largest]
            last = min(bisect.bisect_left(sizes, most), len(sizes) - 1)
            first = min(bisect.bisect_left(sizes, least), last)
            self._rows[requests] = sizes[first : last + 1]
            requests *= 2

    @property
    def all(self) -> list[BucketSize]:
        """Every size, smaller ones of a kind first."""
        sizes = (self._size(rows, requests) for requests, of_requests in self._rows.items() for rows in of_requests)
        return sorted(sizes, key=lambda size: (size.rows, size.requests))

    @property
    def largest(self) -> BucketSize:
        """A size that is as large as any in rows and in requests."""
        return self._size(max(rows[-1] for rows in self._rows.values()), max(self._rows))

    def find(self, num_rows: int, num_requests: int) -> BucketSize | None:
        """The smallest size that holds so many rows of so many requests, if any does."""
        requests = 1 << max(num_requests - 1, 0).bit_length()
        of_requests = self._rows.get(requests, [])
        at = bisect.bisect_left(of_requests, num_rows)
        return self._size(of_requests[at], requests) if at < len(of_requests) else None

    def _size(self, rows: int, requests: int) -> BucketSize:
        return BucketSize(rows, requests, self._rows_per_request)


def row_sizes(most: int) -> list[int]:
    """Numbers of rows up to the first that holds `most`."""
    sizes, unit = [8], 8
    while sizes[-1] < most:
        quarters = (5, 6, 7, 8) if unit >= FINE_ROWS else (6, 8)
        sizes += [unit * q // 4 for q in quarters if unit * q // 4 % 8 == 0]
        unit *= 2
    return sizes[: bisect.bisect_left(sizes, most) + 1]
