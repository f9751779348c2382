"""Ticks, thinning and smoothing; what a chart says to those who do not see it."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.report.charts import (
    Bar,
    Series,
    bar_chart,
    dot_chart,
    line_chart,
    plain,
    smoothed,
    thinned,
    ticks,
)

FINITE = st.floats(min_value=-1e300, max_value=1e300)


@given(one=FINITE, other=FINITE)
def test_ticks_enclose_the_values_evenly(one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(a < b for a, b in pairwise(found))
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.00012, [0, 5e-5, 1e-4, 1.5e-4]),
        (1.23, 4.5, [1, 2, 3, 4, 5]),
        (0, 30000, [0, 10000, 20000, 30000]),
        (0, 0, [0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_long_curve_is_drawn_by_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    drawn = thinned(points, 100)
    assert len(drawn) == 100
    assert drawn[-1] == (9999.0, 0.5)
    assert thinned(points[:50], 100) == points[:50]


def test_smoothing_keeps_a_flat_curve_and_does_not_start_at_zero() -> None:
    flat = [(float(i), 3.0) for i in range(100)]
    assert all(math.isclose(y, 3.0) for _, y in smoothed(flat))
    assert smoothed([(1.0, 2.0), (2.0, 4.0)]) == [(1.0, 2.0), (2.0, 4.0)]  # too few to smooth


def test_a_line_chart_is_told_in_words_and_has_its_values_in_a_table() -> None:
    curve = Series("training", [(1, 3.0), (2, 1.0), (3, 2.0)])
    html = line_chart("Loss", "nats", [curve, Series("held-out", [(3, 1.5)], 1, "dots")])
    assert (
        "Loss, nats, over steps: training from 3 to 2, lowest 1, highest 3; held-out from 1.5"
        in html
    )
    assert '<tr><th scope="row">3</th><td>2</td><td>1.5</td></tr>' in html
    [line] = re.findall(r'class="line c0" d="([^"]+)"', html)
    assert line == "M333.3 0.0L666.7 1000.0L1000.0 500.0"


def test_bars_and_dots() -> None:
    html = bar_chart("Memory", "", [Bar("a", [("x", 3.0), ("y", 1.0)]), Bar("b", [("x", 2.0)])])
    assert 'aria-label="a 4; b 2"' in html
    assert re.findall(r"width:([\d.]+)%", html) == ["75.00", "25.00", "50.00"]
    html = dot_chart("Loss", "", [("a", [1.0, 2.0]), ("b", [])])
    assert 'aria-label="a: 1, 2; b: none"' in html
    assert 'class="mean" style="left:50.00%"' in html


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("x", "", [Series("a", [])]) == ""
    assert bar_chart("x", "", [Bar("a", [("b", 0.0)])]) == ""
    assert dot_chart("x", "", [("a", [])]) == ""


def test_numbers_as_people_write_them() -> None:
    values = (0, 0.5, 1234.5, 23947.4, 1e-4, 2e9)
    assert [plain(v) for v in values] == ["0", "0.5", "1,234", "23,947", "0.0001", "2e+09"]
