"""The batch sizes for which steps are captured."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

MAX_ROWS = 1024
"""Rows of the largest bucket. Larger steps take longer than their launches anyway, and need hundreds of megabytes for
logits."""
MAX_BRANCHES = 3 * MAX_ROWS // 4
"""Most branches of all requests; the rest of the largest bucket is for spine tokens in the same step."""
FINE_ROWS = 256
"""Up to about this many rows a step is bound by reading weights and padding is free; above, sizes are spaced closer."""
ROWS_PER_REQUEST = 4
"""Smallest number of rows per request that a bucket has."""


@dataclass(frozen=True, slots=True)
class BucketSize:
    """Room for `rows` rows of `requests` requests, none of which has more than `rows_per_request`."""

    rows: int
    requests: int
    rows_per_request: int


class Buckets:
    """Sizes for up to `max_num_seqs` requests of up to `rows_per_request` rows each, in ascending order.

    most_rows: limit on the rows of all sizes but the smallest, for which memory for logits is reserved

    Requests are rounded up to a power of two. Rows are rounded up to a power of two times 1 or 1.5 up to `FINE_ROWS`,
    and times 1, 1.25, 1.5 or 1.75 above. Sizes do not depend on context lengths.
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
        """All sizes, in ascending order of rows, then requests."""
        sizes = (self._size(rows, requests) for requests, of_requests in self._rows.items() for rows in of_requests)
        return sorted(sizes, key=lambda size: (size.rows, size.requests))

    @property
    def largest(self) -> BucketSize:
        """A size with the largest number of rows and the largest number of requests, for allocating buffers."""
        return self._size(max(rows[-1] for rows in self._rows.values()), max(self._rows))

    def find(self, num_rows: int, num_requests: int) -> BucketSize | None:
        """The smallest size with room for `num_rows` rows of `num_requests` requests; None if there is none."""
        requests = 1 << max(num_requests - 1, 0).bit_length()
        of_requests = self._rows.get(requests, [])
        at = bisect.bisect_left(of_requests, num_rows)
        return self._size(of_requests[at], requests) if at < len(of_requests) else None

    def _size(self, rows: int, requests: int) -> BucketSize:
        return BucketSize(rows, requests, self._rows_per_request)


def row_sizes(most: int) -> list[int]:
    """Row counts in ascending order, up to the first that is at least `most`."""
    sizes, unit = [8], 8
    while sizes[-1] < most:
        quarters = (5, 6, 7, 8) if unit >= FINE_ROWS else (6, 8)
        sizes += [unit * q // 4 for q in quarters if unit * q // 4 % 8 == 0]
        unit *= 2
    return sizes[: bisect.bisect_left(sizes, most) + 1]
