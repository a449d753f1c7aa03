"""Bars and curves lie where their values say."""

import pytest

from benchmarks.squad.svg_charts import WIDTH, Bar, Curve, bar_chart, curve_chart
from tests.benchmarks.html_reading import read_html, text_of


def test_bars_are_as_long_as_their_values_and_absent_ones_are_not_drawn():
    bars = [Bar("one", 4.0, "4.0", "dense"), Bar("two", 1.0, "1.0", "own"), Bar("three", None, "–", "own")]
    root = read_html(bar_chart(bars, "what it shows"))
    long, short = root.findall(".//rect")
    assert float(long.get("width")) == pytest.approx(4 * float(short.get("width")), abs=0.2)
    assert (long.get("class"), short.get("class")) == ("dense", "own")
    assert [text_of(text) for text in root.findall(".//text")] == ["one", "4.0", "two", "1.0", "three", "–"]
    picture = root.find("svg")
    assert (picture.get("role"), picture.get("aria-label")) == ("img", "what it shows")


@pytest.mark.parametrize("values", [[], [None], [0.0, None]])
def test_bars_of_nothing_are_a_chart_without_bars(values):
    bars = [Bar("name", value, "–", "own") for value in values]
    assert read_html(bar_chart(bars, "nothing")).findall(".//rect") == []


def test_a_name_too_long_for_a_phone_is_shortened():
    shown = text_of(read_html(bar_chart([Bar("x" * 200, 1.0, "1", "own")], "")).find(".//text"))
    assert len(shown) < 60 and shown.endswith("x…")


def positions(chart: str) -> list[tuple[float, float]]:
    return [(float(dot.get("cx")), float(dot.get("cy"))) for dot in read_html(chart).findall(".//circle")]


def test_points_lie_in_proportion_and_are_joined_in_their_order():
    points = [(2.0, 60.0, "a"), (4.0, 70.0, "b"), (3.0, 65.0, "c")]
    chart = curve_chart([Curve("name", points, "own")], "seconds", "F1", "curves")
    (ax, ay), (bx, by), (cx, cy) = positions(chart)
    assert ax < cx < bx and ay > cy > by  # upwards is larger
    assert cx - ax == pytest.approx(bx - cx, abs=0.2) and ay - cy == pytest.approx(cy - by, abs=0.2)
    line = read_html(chart).find(".//polyline").get("points")
    assert line == f"{ax},{ay} {bx},{by} {cx},{cy}"


def test_axes_have_round_numbers_around_all_points():
    chart = curve_chart([Curve("name", [(0.2, 40.0, "a"), (9.7, 66.0, "b")], "own")], "s", "F1", "")
    ticks = [float(text_of(tick)) for tick in read_html(chart).findall(".//text[@class='tick']")]
    assert {0.0, 10.0} <= set(ticks) and min(ticks) == 0.0 and 70.0 in ticks


@pytest.mark.parametrize("points", [[(1.0, 50.0, "alone")], [(1.0, 50.0, "a"), (1.0, 50.0, "b")], [(0.0, 0.0, "zero")]])
def test_points_without_a_range_are_drawn(points):
    for x, y in positions(curve_chart([Curve("name", points, "own")], "s", "F1", "")):
        assert 0 < x < WIDTH and 0 < y < 250


def test_labels_of_neighbours_do_not_cover_each_other():
    points = [(1.0, 50.0, "8 bits"), (1.01, 50.0, "4 bits"), (1.02, 50.0, "3 bits"), (9.0, 60.0, "none")]
    root = read_html(curve_chart([Curve("name", points, "own")], "s", "F1", ""))
    labels = root.findall(".//text[@class='value']")
    places = [(float(label.get("x")), float(label.get("y"))) for label in labels]
    assert [text_of(label) for label in labels] == ["8 bits", "4 bits", "3 bits", "none"]
    for index, (x, y) in enumerate(places):
        assert all(abs(x - other) > 38 or abs(y - below) > 11 for other, below in places[index + 1 :])


def test_texts_are_escaped():
    evil = '<script>"&'
    bars = bar_chart([Bar(evil, 1.0, evil, "own")], evil)
    curves = curve_chart([Curve(evil, [(1.0, 1.0, evil)], "own")], evil, evil, evil)
    for chart in (bars, curves):
        root = read_html(chart)
        assert root.find(".//script") is None
        assert root.find("svg").get("aria-label") == evil
        assert evil in [text_of(text) for text in root.findall(".//text")]
