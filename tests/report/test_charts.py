"""Positions in charts, for numbers whose place is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tangent_ops.report.charts import dot_plot, plot
from tangent_ops.shards.scoring import Estimate


def test_dots_lie_where_their_values_are_on_the_axis() -> None:
    found = dot_plot({"a": Estimate(0.85, 0.05), "b": Estimate(0.95, 0.01)}, str, str)
    ticks = {tick.label: tick.at for tick in found.ticks}
    assert (ticks["0.8"], found.ticks[-1].at) == (0, 100)
    high = float(found.ticks[-1].label)
    for dot, value, error in zip(found.dots, (0.85, 0.95), (0.05, 0.01), strict=True):
        assert dot.at == pytest.approx(100 * (value - 0.8) / (high - 0.8))
        assert dot.width == pytest.approx(100 * 2 * error / (high - 0.8))
        assert dot.low + dot.width / 2 == pytest.approx(dot.at)


NUMBERS = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(st.lists(st.tuples(NUMBERS, st.floats(0, 100)), min_size=1, max_size=5))
def test_everything_is_within_the_chart(values) -> None:
    found = dot_plot({str(k): Estimate(*one) for k, one in enumerate(values)}, str, str)
    assert 2 <= len(found.ticks) <= 7
    assert (found.ticks[0].at, found.ticks[-1].at) == pytest.approx((0, 100))
    for dot in found.dots:
        assert -1e-6 <= dot.low <= dot.at + 1e-6 <= dot.low + dot.width + 2e-6 <= 100 + 3e-6


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_none_or_all_stays_between_none_and_all(share: float) -> None:
    found = dot_plot({"a": Estimate(share, 0.0)}, str, str, limits=(0, 1))
    ends = [float(found.ticks[place].label) for place in (0, -1)]
    assert 0 <= ends[0] < ends[1] <= 1
    assert found.dots[0].at == pytest.approx(100 * share)


def test_curves_run_from_the_first_epoch_to_the_last() -> None:
    found = plot({"a": [4.0, 2.0, 1.0], "b": [3.0], "none": [], "nan": [math.nan]}, "{:g}".format)
    assert found is not None
    one, other = found.curves
    assert (one.name, one.label, found.epochs, found.logarithmic) == ("a", "4 → 1", 3, False)
    assert one.path.split(" L")[0].startswith("M0.00 ") and " L100.00 " in one.path
    heights = [float(point.split()[1]) for point in one.path[1:].split(" L")]
    assert heights == sorted(heights)  # SVG counts from above, so the loss falls
    assert (heights[1] - heights[0]) == pytest.approx(2 * (heights[2] - heights[1]), abs=0.05)
    assert other.path.endswith(" h0")  # a point
    assert plot({"a": []}, str) is None


def test_decades_are_drawn_on_a_logarithmic_axis() -> None:
    found = plot({"a": [1000.0, 10.0]}, "{:g}".format)
    assert found is not None and found.logarithmic
    assert [tick.label for tick in found.ticks] == ["10", "100", "1000"]
    assert found.curves[0].path == "M0.00 0.00 L100.00 100.00"
