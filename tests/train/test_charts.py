"""Charts: well-formed, alone on any page, and every number at its place."""

from __future__ import annotations

import re
from itertools import pairwise
from math import inf, nan
from xml.etree import ElementTree

import pytest

from qwen2.train.charts import dot_chart, line_chart, number, ticks

SVG = "{http://www.w3.org/2000/svg}"


def test_a_line_goes_through_its_points():
    tree = ElementTree.fromstring(line_chart({"loss": [(0, 9.0), (50, nan), (100, 1.0)]}, "step", "loss", (720, 320)))
    (line,) = tree.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert (x0, x1) == (64, 696)
    at = {element.text: float(element.attrib["y"]) - 4 for element in tree.iter(f"{SVG}text") if element.attrib["text-anchor"] == "end"}
    assert at["10"] < y0 < at["8"]
    assert at["2"] < y1 < at["0"]


def test_marks_and_names_stand_beside_the_lines():
    svg = line_chart({"a <b>": [(0, 1)], "c": [(1, 2), (2, 3)]}, "step", "loss", marks=[(1, "long context")])
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"a <b>", "c", "step", "loss", "long context"} <= set(texts)
    assert "stroke-dasharray" in svg


def test_a_dot_for_each_value():
    tree = ElementTree.fromstring(dot_chart({"de": {"before": 2.0, "after": 1.0}, "lo": {"after": 1.5, "before": inf}}, "bits per byte"))
    titles = [element.text for element in tree.iter(f"{SVG}title")]
    assert titles == ["de, before: 2.000", "de, after: 1.000", "lo, after: 1.500"]
    before, after, alone = [float(c.attrib["cx"]) for c in tree.iter(f"{SVG}circle") if c.attrib["cy"] != "14"]
    assert after < alone < before
    assert alone == pytest.approx((before + after) / 2, abs=0.1)


def test_nothing_is_loaded_from_elsewhere():
    svg = line_chart({"a": [(0, 1), (1, 2)]}, "x", "y") + dot_chart({"de": {"a": 1.0}}, "x")
    assert not re.findall(r"(?:href|src|url\()", svg.replace("http://www.w3.org/2000/svg", ""))


@pytest.mark.parametrize("chart", [lambda: line_chart({"a": [(0, nan)]}, "x", "y"), lambda: dot_chart({"a": {"b": inf}}, "x")])
def test_nothing_to_show_is_an_error(chart):
    with pytest.raises(ValueError, match="at least one finite"):
        chart()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.2, 9.7), (-3, 8), (5, 5), (0, 1e9), (2.0, 2.01), (0, 0)])
def test_ticks_cover_what_they_are_for(low: float, high: float):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 9
    assert all(b > a for a, b in pairwise(marks))


def test_numbers_as_people_write_them():
    assert [number(x) for x in (0, 0.25, 1500, 2_000_000, 3e9)] == ["0", "0.25", "1.5k", "2M", "3G"]
