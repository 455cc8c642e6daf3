"""Piecewise linear cost curves."""

from bisect import bisect_left
from collections.abc import Sequence

Point = tuple[float, float]


def interpolate(points: Sequence[Point], x: float, floor: float = 1.0) -> float:
    """Interpolate linearly between `points`, (x, y) sorted by x.

    Beyond either end the curve continues with the slope of the nearest segment, or level if that slope is negative.
    Before the first point it is at least `floor` times the first value, so 1 keeps it level there.
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
