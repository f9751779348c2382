"""A curve keeps its shape, its last value and its highest one in bounded memory."""

from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.report import curve as module
from halfbyte.report.curve import Curve

VALUES = st.lists(st.floats(-1e6, 1e6), max_size=300)


@settings(max_examples=40)
@given(VALUES)
def test_a_short_curve_is_what_was_added(values: list[float]) -> None:
    curve = Curve()
    for x, y in enumerate(values):
        curve.append(x, y)
    assert list(curve) == list(enumerate(values))
    assert curve[:2] == list(enumerate(values))[:2]
    assert curve.last == (values[-1] if values else None)
    assert curve.highest == max(values, default=None)
    assert curve.furthest == max(0, len(values) - 1)


def test_a_long_curve_is_bounded_and_its_points_are_means_of_equal_shares() -> None:
    curve, count = Curve(), 50_000
    for x in range(1, count + 1):
        curve.append(x, float(x))
        assert len(curve) <= module._MOST_POINTS
    assert curve.share == 16
    assert (curve.last, curve.highest, curve.furthest) == (count, count, count)
    # The mean of x - 15 … x is x - 7.5; the last point holds what has come since.
    assert all(y == x - 7.5 for x, y in curve[:-1])
    assert curve[-1][0] == count
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)
