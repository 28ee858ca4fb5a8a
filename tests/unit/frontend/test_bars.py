"""Bars of shares: as long as they say, one below the other, none for what was not measured."""

from frontend import bars


def test_bars_are_in_proportion_and_in_order() -> None:
    chart = bars.chart([("R@1", 0.25), ("AUROC", None), ("MRR", 1.0), ("none", 0.0)])
    assert chart is not None
    assert [(bar.label, bar.text, bar.length) for bar in chart.bars] == [
        ("R@1", "0.250", 87.5), ("MRR", "1.000", 350.0), ("none", "0.000", 0.0),
    ]  # fmt: skip
    places = [(bar.y, bar.middle) for bar in chart.bars]
    assert places == sorted(places)
    assert all(bar.y < bar.middle < bar.y + chart.thick for bar in chart.bars)
    assert all(one.y + chart.thick <= other.y for one, other in zip(chart.bars, chart.bars[1:], strict=False))
    # The longest bar leaves room for its figure.
    assert chart.bars[1].end + 40 <= chart.width
    assert chart.bars[-1].y + chart.thick <= chart.height
    assert chart.description == "R@1 0.250, MRR 1.000, none 0.000"


def test_nothing_measured_is_no_chart() -> None:
    assert bars.chart([("R@1", None)]) is None
    assert bars.chart([]) is None
