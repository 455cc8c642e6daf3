"""Piecewise linear cost curves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ssd.policy.curve import interpolate

curves = st.lists(st.tuples(st.floats(1, 100), st.floats(0.1, 10)), min_size=1, max_size=6).map(
    lambda points: sorted(dict(points).items())
)


@given(curves, st.floats(0, 200))
def test_interpolation_stays_between_its_neighbours(points, x):
    value = interpolate(points, x)
    if x <= points[-1][0]:
        assert min(y for _, y in points) - 1e-9 <= value <= max(y for _, y in points) + 1e-9
    else:
        assert value >= points[-1][1] - 1e-9


@given(curves, st.floats(0, 1), st.floats(0, 1))
def test_extrapolation_below_the_first_point_keeps_to_the_floor(points, x, floor):
    first = points[0][1]
    assert floor * first <= interpolate(points, x, floor) <= first


def test_measured_points_and_slopes_are_kept():
    points = [(1.0, 2.0), (3.0, 6.0), (5.0, 5.0)]
    assert [interpolate(points, x) for x in (1, 2, 3, 4, 5)] == [2, 4, 6, 5.5, 5]
    assert interpolate(points, 9) == 5, "a falling curve stays level beyond its last point"
    assert interpolate(points[:2], 4) == 8
    assert interpolate(points, 0.5) == 2 and interpolate(points, 0.5, 0.5) == pytest.approx(1.0)
    assert interpolate([(1.0, 2.0), (1.0, 4.0)], 1.5) == 4, "two measurements of one width"
