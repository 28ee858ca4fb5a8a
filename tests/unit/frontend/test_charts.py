"""The geometry of the chart of sizes, against figures worked out by hand."""

import pytest

from frontend import charts


@pytest.mark.parametrize(
    ("density", "bits"),
    # H(k) + k: at a half 1 + 0.5, at a quarter 0.811278 + 0.25, at a twentieth 0.286397 + 0.05.
    [(0.5, 1.5), (0.25, 1.061278), (0.05, 0.336397)],
)
def test_the_bound_is_the_entropy_of_places_plus_one_bit_for_each_sign(density: float, bits: float) -> None:
    assert charts.bound_bytes(8_000_000, density) == pytest.approx(1_000_000 * bits, rel=1e-6)
    assert charts.bound_bytes(1000, 0) == 0
    assert charts.bound_bytes(8000, 1) == 1000


def test_points_stand_where_their_density_and_bytes_say_and_above_the_line() -> None:
    chart = charts.chart(count=663_552, files=[(0.2, 78_066, True), (0.05, 29_202, True), (0.1, 49_000, False)])
    assert chart is not None
    assert [(point.label, point.size_bytes, point.is_default) for point in chart.points] == [
        ("5 %", 29_202, True), ("10 %", 49_000, False), ("20 %", 78_066, True),
    ]  # fmt: skip
    ticks_x = {tick.label: tick.at for tick in chart.ticks_x}
    assert chart.points[1].x == pytest.approx(ticks_x["10 %"], abs=0.1)
    assert chart.points[0].x < chart.points[1].x < chart.points[2].x
    assert chart.points[0].y > chart.points[1].y > chart.points[2].y
    assert chart.unit == "KB"
    low, high = chart.ticks_y[0], chart.ticks_y[-1]
    scale = (low.at - high.at) / float(high.label) / 1000
    for point in chart.points:
        assert low.at - point.y == pytest.approx(point.size_bytes * scale, abs=0.1)
    line = [tuple(map(float, pair.split(","))) for pair in chart.bound.split(" ")]
    for point in chart.points:
        near = min(line, key=lambda place: abs(place[0] - point.x))
        assert point.y < near[1] + 1
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in line)
    assert 4 <= len(chart.ticks_y) - 1 <= 10
    assert "5 % of the values: 29,202 bytes" in chart.description


def test_without_files_there_is_no_chart_and_a_file_of_all_values_is_not_on_it() -> None:
    assert charts.chart(count=100, files=[]) is None
    assert charts.chart(count=100, files=[(1.0, 60, True)]) is None


def test_files_at_high_densities_stay_inside_the_drawing() -> None:
    chart = charts.chart(count=10**9, files=[(0.9, 200_000_000, True)])
    assert chart is not None
    assert chart.unit == "MB"
    assert chart.points[0].x < chart.right
