"""The picture of a run shows what its lines have, and its languages can be told apart."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2.train.metrics import curves

pytest.importorskip("matplotlib")

LINE = {"tokens": 9, "loss": 4.0, "lr": 0.1, "grad_norm": 0.5, "tokens_per_s": 99.0, "mfu": 0.6}


def lines(languages: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": step, **LINE} for step in range(1, 9)]
    for step in (0, 8):
        found.append({"step": step, "eval": {f"l{number:02}": 9.0 - step / 2 + number / 10 for number in range(languages)}})
    return found


def test_everything_that_is_logged_has_a_panel() -> None:
    axes = curves(lines(2), "bits per byte").axes
    titles = [axis.get_title() for axis in axes]
    assert titles == ["loss", "learning rate", "gradient norm", "tokens/s", "share of the products' rate", "bits per byte"]
    assert [list(axis.lines[0].get_ydata()) for axis in axes[:5]] == [
        [LINE[name]] * 8 for name in ("loss", "lr", "grad_norm", "tokens_per_s", "mfu")
    ]
    unmeasured = [{**line, "mfu": None} for line in lines(0)]
    assert curves(unmeasured, "").axes[4].get_title() == "share of the products' rate: not measured"


@pytest.mark.parametrize(("languages", "named"), [(8, [f"l{number:02}" for number in range(7, -1, -1)]),
                                                  (29, ["all 29", "l28", "l27", "l26", "mean of 29", "l02", "l01", "l00"])])  # fmt: skip
def test_no_two_lines_look_alike_and_none_is_hidden(languages: int, named: list[str]) -> None:
    figure = curves(lines(languages), "bits per byte")
    axis = figure.axes[5]
    legend = axis.get_legend()
    assert [text.get_text().partition(":")[0] for text in legend.get_texts()] == named
    colours = [line.get_color() for line in axis.lines]
    assert len(set(colours)) == len(colours)
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= axis.get_window_extent().x1, "beside the lines, not on them"
    assert legend.get_window_extent().x1 <= figure.bbox.x1
    if languages == 29:
        (mean,) = [line for line in axis.lines if str(line.get_label()).startswith("mean of 29: 6.400")]
        assert list(mean.get_ydata()) == pytest.approx([10.4, 6.4])
