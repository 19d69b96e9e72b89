"""Charts as SVG text, drawn by matplotlib: lines over steps, and a dot per series for each of many labels.

An SVG made here stands alone as a file and inline in a page, its letters are outlines, and the same numbers give the same text.
What is left out: interaction, dates.

    Path("loss.svg").write_text(line_chart({"train": [(0, 9.0), (100, 4.2)]}, x="step", y="loss"))
"""

from __future__ import annotations

from io import StringIO
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#64748b", "#be185d")
NAMED = 5  # series in a line of the legend
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
STYLE: Any = {
    "svg.hashsalt": "qwen2",  # ids inside the file: not drawn by chance
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def line_chart(series: Mapping[str, Sequence[Point]], x: str, y: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Lines, one colour each. `marks` are (x, text): dashed uprights, such as where a stage begins.

    Points that are not finite are left out of the line. Raises ValueError where no point is left.
    """
    lines = {name: [point for point in points if all(map(isfinite, point))] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        raise ValueError("a chart needs at least one finite point")

    def draw(axes: Axes) -> None:
        for (name, points), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
            axes.plot(
                *zip(*points, strict=True), color=colour, label=name, linewidth=1.6, marker="o" if len(points) == 1 else None, gid=name
            )
        for place, text in marks:
            axes.axvline(place, color=FAINT, linewidth=0.8, linestyle="--")
            axes.annotate(text, (place, 0.97), xycoords=("data", "axes fraction"), xytext=(4, -8), textcoords="offset points", color=FAINT)
        axes.grid(axis="y")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_formatter(_short())
        axes.set_xlim(left=min(0.0, *(point[0] for points in lines.values() for point in points)))
        axes.margins(x=0.01)

    return _svg(draw, (7.2, 3.2), names=len(lines))


def dot_chart(rows: Mapping[str, Mapping[str, float]], x: str) -> str:
    """A line per label with a dot for each series, joined: what each of many languages had before and has after.

    Raises ValueError where there is nothing finite to show.
    """
    shown = {label: {name: value for name, value in row.items() if isfinite(value)} for label, row in rows.items()}
    names = list(dict.fromkeys(name for row in shown.values() for name in row))
    if not names:
        raise ValueError("a chart needs at least one finite value")

    def draw(axes: Axes) -> None:
        for place, row in enumerate(shown.values()):
            if row:
                first = 0.0 if len(names) == 1 else min(row.values())
                axes.plot([first, max(row.values())], [place, place], color="#cbd5e1", linewidth=1.6, zorder=1)
        for i, name in enumerate(names):
            colour, marker = COLOURS[i % len(COLOURS)], "oDs^"[i // len(COLOURS) % 4]  # colours that come again have another form
            across, down = zip(*[(row[name], place) for place, row in enumerate(shown.values()) if name in row], strict=True)
            axes.scatter(across, down, color=colour, marker=marker, s=24, label=name, zorder=2, gid=name)
        axes.set_yticks(range(len(shown)), list(shown))
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_xlabel(x)
        axes.xaxis.set_major_formatter(_short())
        axes.set_xlim(left=min(0.0, *(value for row in shown.values() for value in row.values())))

    return _svg(draw, (7.2, 1.1 + 0.19 * (len(shown) + (len(names) - 1) // NAMED)), names=len(names))


def _short() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _svg(draw: Any, size: tuple[float, float], names: int) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure: Figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper right", ncols=min(names, NAMED))
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration and the DTD's address, which have no place in a page
