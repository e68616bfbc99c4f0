"""Charts: axes hold their values with correct labels, marks are where they should be, and every text is escaped."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from olmoscope.evaluate import charts
from olmoscope.evaluate.charts import Bar, Counts, Point, Series
from olmoscope.evaluate.scales import Axis, exact, fitting, linear, log_label, logarithmic, say

HOSTILE = "</title></svg><script>alert(1)</script>&\"'"
values = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=5)


@example([1.0, 1.0000001])
@example([31.9999, 32.0])
@settings(max_examples=400)
@given(values)
def test_an_axis_holds_its_values_and_has_a_few_ticks_within(numbers):
    for axis in (linear("", numbers), linear("", numbers, zero=False), logarithmic("", numbers), fitting("", numbers)):
        assert axis.low <= min(numbers) * (1 + 1e-6) and max(numbers) <= axis.high * (1 + 1e-6)
        ticks = axis.ticks()
        assert 2 <= len(ticks) <= 8, (axis, ticks)
        assert len({text for _, text in ticks}) == len(ticks), (axis, ticks)
        assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value, _ in ticks)


@pytest.mark.parametrize(("axis", "texts"), [
    (linear("", [0.9]), ["0.00", "0.25", "0.50", "0.75", "1.00"]),
    (linear("", [0.12], "share"), ["0%", "5%", "10%", "15%"]),
    (linear("", [0.0, 0.0], "share"), ["0%", "1%", "2%", "3%", "4%"]),
    (linear("", [1e-3]), ["0", "0.00025", "0.0005", "0.00075", "0.001"]),
    (exact("", 0, 400_000, "count"), ["0", "100k", "200k", "300k", "400k"]),
    (logarithmic("", [0.013, 0.4]), ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]),
    (logarithmic("", [1e-7, 1e-1], "share"), ["10⁻⁷", "10⁻⁵", "0.1%", "10%"]),
])
def test_ticks(axis, texts):
    assert [text for _, text in axis.ticks()] == texts


def test_values_in_words():
    assert [say(0.04913), say(12.3456), say(0.0), say(3e-6), say(123456.0)] == [
        "0.04913", "12.35", "0", "3.000e-06", "123,456"]
    assert [say(0.9387, "share"), say(0.00342, "share"), say(30000, "count")] == ["93.87%", "0.342%", "30,000"]
    assert [log_label(2e-6), log_label(20000), log_label(0.5)] == ["2·10⁻⁶", "20k", "0.5"]


def drawn():
    axis = Axis(HOSTILE, 0, 10)
    return [
        charts.lines(HOSTILE, [Series(HOSTILE, 1, [(0, 1), (5, 10)]), Series("b", 2, [(5, 0)])], axis, axis, dots=True),
        charts.histogram(HOSTILE, [0, 5, 10], [Counts("a", 1, [2, 10])], axis, axis, lambda number: HOSTILE),
        charts.histogram(HOSTILE, [0, 5, 10], [Counts(HOSTILE, 1, [2, 3]), Counts("b", 2, [0, 1])], axis, axis, str),
        charts.bars(HOSTILE, [Bar(HOSTILE * 3, 1, 4.0, (3.0, 5.0)), Bar("b", 0, 0.0)], axis),
        charts.scatter(HOSTILE, [Point(HOSTILE, HOSTILE, 1, 3, 3), Point("b", "b", 2, 3, 3)], axis, axis, [[0, 1]]),
    ]


@pytest.mark.parametrize("number", range(5))
def test_charts_are_well_formed_and_texts_stay_text(number):
    svg = ElementTree.fromstring(str(drawn()[number]))
    assert svg.tag == "svg" and svg.get("aria-label") == HOSTILE
    assert not [element.tag for element in svg.iter() if element.tag not in
                ("svg", "g", "path", "text", "rect", "circle", "title")]
    assert all(hit.find("title").text for hit in svg.iter("g"))


def test_where_things_stand():
    """The highest bar reaches the upper end of its axis, an empty bin has none, and the tip has the value."""
    axis = Axis("", 0, 10)
    svg = ElementTree.fromstring(str(charts.histogram("t", [0, 5, 10], [Counts("a", 1, [10, 0])], axis, axis,
                                                      lambda number: f"bin {number}")))
    bars = [path.get("d") for path in svg.iter("path") if path.get("class") == "bar s1"]
    assert len(bars) == 1
    assert f"V{charts.TOP + 2.5}q" in bars[0]
    assert [title.text for title in svg.iter("title")] == ["bin 0\n10.00", "bin 1\n0"]


def test_every_line_is_told_at_a_common_place():
    axis = Axis("step", 0, 10, "count")
    svg = ElementTree.fromstring(str(charts.lines("t", [Series("a", 1, [(0, 1), (5, 2)]), Series("b", 2, [(5, 3)])],
                                                  axis, Axis("", 0, 3))))
    assert [title.text for title in svg.iter("title")] == ["step 0\na  1.000", "step 5\na  2.000\nb  3.000"]
    left, right = [(float(rect.get("x")), float(rect.get("width"))) for rect in svg.iter("rect")]
    assert left[0] == charts.LEFT and left[0] + left[1] == right[0]
    assert right[0] + right[1] == charts.WIDTH - charts.RIGHT


def test_labels_of_points_at_one_place_do_not_meet():
    axis = Axis("", 0, 10)
    points = [Point(letter, letter, 1, 5, 5) for letter in "ABCD"]
    svg = ElementTree.fromstring(str(charts.scatter("t", points, axis, axis)))
    places = [(text.get("x"), text.get("y")) for text in svg.iter("text") if text.get("class") == "label"]
    assert len(set(places)) == 4
