"""Charts: well-formed, alone on any page, the same for the same numbers, and what has no place in them."""

from __future__ import annotations

import re
from math import inf, nan
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from qwen2.train.charts import dot_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def numbers(svg: str, name: str) -> list[float]:
    """The coordinates of the first path of a group."""
    group = next(element for element in ElementTree.fromstring(svg).iter(f"{SVG}g") if element.get("id") == name)
    path = next(group.iter(f"{SVG}path")).attrib["d"]
    return [float(x) for x in re.findall(r"[-\d.]+", path)]


def places(svg: str, name: str) -> list[float]:
    """Where the dots of a series lie, from left to right of the picture."""
    group = next(element for element in ElementTree.fromstring(svg).iter(f"{SVG}g") if element.get("id") == name)
    return [float(dot.attrib["x"]) for dot in group.iter(f"{SVG}use")]


def test_a_line_goes_through_its_finite_points():
    x0, y0, x1, y1, x2, y2 = numbers(line_chart({"loss": [(0, 9.0), (25, nan), (50, 5.0), (100, 1.0)]}, "step", "loss"), "loss")
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y1 - y0 == pytest.approx(y2 - y1)
    assert y0 < y2  # down the page is down in loss


def test_marks_are_dashed():
    plain = line_chart({"a": [(0, 1), (2, 2)]}, "step", "loss")
    assert "stroke-dasharray" not in plain
    assert "stroke-dasharray" in line_chart({"a": [(0, 1), (2, 2)]}, "step", "loss", marks=[(1, "long")])


def test_a_dot_for_each_value():
    svg = dot_chart({"de": {"before": 2.0, "after": 1.0}, "lo": {"after": 1.5, "before": inf}}, "bits per byte")
    (before,) = places(svg, "before")
    german, lao = places(svg, "after")
    assert before - lao == pytest.approx(lao - german, abs=0.1)


def test_the_same_numbers_give_the_same_text():
    assert line_chart({"a": [(0, 1), (1, 2)]}, "x", "y") == line_chart({"a": [(0, 1), (1, 2)]}, "x", "y")


def test_nothing_is_loaded_from_elsewhere():
    svg = line_chart({"a": [(0, 1), (1, 2)]}, "x", "y") + dot_chart({"de": {"a": 1.0}}, "x")
    assert svg.startswith("<svg")
    assert not re.findall(r'(?:href|src)="(?!#)', svg)
    assert not re.findall(r"url\((?!#)", svg)


@pytest.mark.parametrize("chart", [lambda: line_chart({"a": [(0, nan)]}, "x", "y"), lambda: dot_chart({"a": {"b": inf}}, "x")])
def test_nothing_to_show_is_an_error(chart):
    with pytest.raises(ValueError, match="at least one finite"):
        chart()


def test_many_series_are_all_named_inside_the_picture_and_told_apart(monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **more: (drawn.append(figure), save(figure, *given, **more)))
    names = [f"after-stage-{i}" for i in range(11)]
    dot_chart({"de": {name: 1.0 + i for i, name in enumerate(names)}}, x="bits per byte")
    (figure,) = drawn
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(names)
    figure.draw_without_rendering()
    box, dots = legend.get_window_extent(), figure.axes[0].collections
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.axes[0].get_window_extent().y1
    forms = {(tuple(dot.get_facecolor()[0]), len(dot.get_paths()[0].vertices)) for dot in dots}
    assert len(forms) == len(names)
