"""Charts as SVG text: lines over steps, and a dot per series for each of many labels. No library, no fonts, nothing to load.

An SVG made here stands alone as a file and inline in a page. What is left out: legends outside the plot, dates, interaction.

    Path("loss.svg").write_text(line_chart({"train": [(0, 9.0), (100, 4.2)]}, x="step", y="loss"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

Point = tuple[float, float]

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#64748b", "#be185d")
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'


@dataclass(frozen=True)
class Scale:
    """A stretch of numbers laid over a stretch of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low to high: the first is not above low, the last not below high."""
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / about
    unit = 10.0 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """As a person writes it on an axis: 1500000 -> 1.5M, 0.25 -> 0.25."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def line_chart(
    series: Mapping[str, Sequence[Point]],
    x: str,
    y: str,
    size: tuple[int, int] = (720, 320),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines, one colour each, named at the top. `marks` are (x, text): dashed uprights, such as where a stage begins.

    Points that are not finite are left out of the line. Raises ValueError where no point is left.
    """
    lines = {name: [point for point in points if all(map(isfinite, point))] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        raise ValueError("a chart needs at least one finite point")
    width, height = size
    xs = [px for points in lines.values() for px, _ in points]
    ys = [py for points in lines.values() for _, py in points]
    across, up = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys))
    to_x = Scale(min(xs), max(max(xs), min(xs) + 1e-9), 64, width - 24)
    to_y = Scale(up[0], up[-1], height - 46, 40)
    parts = [_rule(64, to_y(value), width - 24, to_y(value)) + _text(56, to_y(value) + 4, number(value), "end") for value in up]
    inside = [value for value in across if to_x.low <= value <= to_x.high]
    parts += [_text(to_x(value), height - 28, number(value), "middle") for value in inside]
    parts.append(_text((64 + width - 24) / 2, height - 8, x, "middle", FAINT))
    parts.append(_text(12, 18, y, "start", FAINT))
    for place, text in marks:
        parts.append(_rule(to_x(place), 40, to_x(place), height - 46, FAINT, dashed=True) + _text(to_x(place) + 4, 52, text, colour=FAINT))
    for (_, points), colour in zip(lines.items(), _colours(), strict=False):
        parts.append(_line([(to_x(px), to_y(py)) for px, py in points], colour))
    parts.append(_legend(list(lines), width - 24))
    return _svg(width, height, parts)


def dot_chart(rows: Mapping[str, Mapping[str, float]], x: str, width: int = 720) -> str:
    """A line per label with a dot for each series, joined: what each of many languages had before and has after.

    Raises ValueError where there is nothing finite to show.
    """
    values = [value for row in rows.values() for value in row.values() if isfinite(value)]
    if not values:
        raise ValueError("a chart needs at least one finite value")
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    colour_of = dict(zip(names, _colours(len(names)), strict=True))
    pitch, top = 19, 40
    bottom = top + pitch * len(rows)
    left = 16 + 7 * max(map(len, rows))
    across = ticks(min(0.0, *values), max(values), 6)
    to_x = Scale(across[0], across[-1], left, width - 24)
    parts = [_rule(to_x(v), top - 6, to_x(v), bottom) + _text(to_x(v), bottom + 16, number(v), "middle") for v in across]
    parts.append(_text((left + width - 24) / 2, bottom + 34, x, "middle", FAINT))
    for place, (label, row) in enumerate(rows.items()):
        middle = top + pitch * (place + 0.5)
        shown = {name: value for name, value in row.items() if isfinite(value)}
        parts.append(_text(left - 8, middle + 4, label, "end"))
        if shown:
            parts.append(_rule(to_x(min(shown.values())), middle, to_x(max(shown.values())), middle, "#cbd5e1", thick=2))
        parts += [
            f'<circle cx="{to_x(value):.1f}" cy="{middle:.1f}" r="4.5" fill="{colour_of[name]}">'
            f"<title>{escape(f'{label}, {name}: {value:.3f}')}</title></circle>"
            for name, value in shown.items()
        ]
    parts.append(_legend(names, width - 24))
    return _svg(width, bottom + 44, parts)


def _colours(count: int = len(COLOURS)) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" {FONT}>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str = GRID, thick: int = 1, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{thick}"{dash}/>'


def _line(points: Sequence[Point], colour: str) -> str:
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{colour}"/>'
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>'


def _legend(names: Sequence[str], right: float) -> str:
    """Names with their colours, at the top, ending at the right edge."""
    widths = [22 + 6.6 * len(name) for name in names]
    place = right - sum(widths)
    parts = []
    for name, colour, width in zip(names, _colours(len(names)), widths, strict=True):
        parts.append(f'<circle cx="{place + 5:.1f}" cy="14" r="4.5" fill="{colour}"/>' + _text(place + 14, 18, name))
        place += width
    return "".join(parts)
