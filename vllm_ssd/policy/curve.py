"""Piecewise linear cost curves."""

from bisect import bisect_left
from collections.abc import Sequence

Point = tuple[float, float]


def interpolate(points: Sequence[Point], x: float, floor: float = 1.0) -> float:
    """Value at `x` of the line through `points`, (x, y) sorted by x.

    Beyond the last point it continues with the last slope, before the first with the first slope, where these rise.
    Before the first point it stays at or above `floor` times the first value: 1 keeps it level.
    """
    if len(points) == 1:
        return points[0][1]
    i = bisect_left(points, (x,), 1, len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if x > x1:
        return y1 + max(slope, 0.0) * (x - x1)
    if x < x0:
        return max(y0 - max(slope, 0.0) * (x0 - x), floor * y0)
    return y0 + slope * (x - x0)
