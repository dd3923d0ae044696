"""Curves as text for a terminal and as a self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

__all__ = ["Line", "svg", "text_plot"]

Line = tuple[str, str, Sequence[tuple[float, float]]]
"""(label, colour as a CSS name or #rrggbb, points)."""

BRAILLE = 0x2800
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of each dot, by row and column of a cell


class _Axes:
    """Maps data to a grid of `columns` x `rows` cells, whose first row is at the top."""

    def __init__(self, lines: Sequence[Line], columns: int, rows: int) -> None:
        points = [point for _, _, points in lines for point in points]
        self.left, self.right = min(x for x, _ in points), max(x for x, _ in points)
        self.low, self.high = min(y for _, y in points), max(y for _, y in points)
        self._columns, self._rows = columns - 1, rows - 1

    def place(self, x: float, y: float) -> tuple[int, int]:
        """The column and row nearest to a point."""
        across = (x - self.left) / ((self.right - self.left) or 1)
        down = (self.high - y) / ((self.high - self.low) or 1)
        return round(across * self._columns), round(down * self._rows)

    def path(self, points: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
        """Every cell on the straight lines between the points."""
        passed: list[tuple[int, int]] = []
        corners = [self.place(x, y) for x, y in points]
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] or corners, strict=False):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            passed += [(round(x0 + (x1 - x0) * n / steps), round(y0 + (y1 - y0) * n / steps)) for n in range(steps + 1)]
        return passed


def text_plot(
    lines: Sequence[Line],
    *,
    columns: int,
    rows: int,
    paint: Callable[[str, int], str] | None = None,
) -> str:
    """The curves in character cells, with the vertical axis labelled.

    Args:
        lines: The curves; later ones are drawn over earlier ones.
        columns: The number of columns of cells.
        rows: The number of rows of cells.
        paint: Colours a text in the colour of the line with a number; the curves are then drawn in braille dots.
            Without it, each curve is drawn with the first character of its label, in ASCII.
    """
    fine = paint is not None
    axes = _Axes(lines, columns * (2 if fine else 1), rows * (4 if fine else 1))
    dots = [[0] * columns for _ in range(rows)]
    owner = [[-1] * columns for _ in range(rows)]
    for number, (_, _, points) in enumerate(lines):
        for across, down in axes.path(points):
            column, row = (across // 2, down // 4) if fine else (across, down)
            if owner[row][column] != number:
                owner[row][column], dots[row][column] = number, 0
            dots[row][column] |= DOTS[down % 4][across % 2]
    width = len(f"{axes.high:.2f}")
    shown = []
    for row in range(rows):
        value = axes.high - (axes.high - axes.low) * row / max(rows - 1, 1)
        label = f"{value:.2f}" if row in (0, rows // 2, rows - 1) else ""
        cells = []
        for number, bits in zip(owner[row], dots[row], strict=True):
            if number < 0:
                cells.append(" ")
            else:
                cells.append(paint(chr(BRAILLE + bits), number) if paint else lines[number][0][0])
        shown.append(f"{label:>{width}} |" + "".join(cells).rstrip())
    return "\n".join([*shown, " " * width + " +" + "-" * columns])


def svg(lines: Sequence[Line], *, title: str, notes: Sequence[str], across: str, up: str) -> str:
    """The curves as a self-contained SVG document.

    Args:
        lines: The curves.
        title: The title above the drawing.
        notes: Lines of text below it.
        across: The label of the horizontal axis.
        up: The label of the vertical axis.
    """
    left, top, width, height = 70, 50, 640, 340
    axes = _Axes(lines, width * 10 + 1, height * 10 + 1)  # tenths of a unit

    def at(x: float, y: float) -> tuple[float, float]:
        column, row = axes.place(x, y)
        return left + column / 10, top + row / 10

    parts: list[str] = []
    for value in _ticks(axes.low, axes.high):
        y = at(axes.left, value)[1]
        parts.append(f'<path d="M{left} {y}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in _ticks(axes.left, axes.right):
        x = at(value, axes.low)[0]
        parts.append(f'<path d="M{x} {top + height}v5" stroke="#555"/>')
        parts.append(f'<text x="{x}" y="{top + height + 20}" text-anchor="middle">{value:,g}</text>')
    parts.append(f'<path d="M{left} {top}v{height}h{width}" fill="none" stroke="#555"/>')
    for number, (label, colour, points) in enumerate(lines):
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + 18 + 20 * number
        parts.append(f'<path d="M{left + width - 300} {y - 4}h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{left + width - 268}" y="{y}">{escape(label)}</text>')
    bottom = top + height + 44
    parts.append(f'<text x="{left + width / 2}" y="{bottom}" text-anchor="middle">{escape(across)}</text>')
    middle = top + height / 2
    parts.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    for number, note in enumerate(notes):
        parts.append(f'<text x="{left}" y="{bottom + 28 + 18 * number}" fill="#555">{escape(note)}</text>')
    whole = left + width + 30, bottom + 28 + 18 * len(notes)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole[0]} {whole[1]}" width="{whole[0]}" '
        f'height="{whole[1]}" font-family="sans-serif" font-size="13">'
    )
    title_line = f'<text x="{left}" y="30" font-size="17">{escape(title)}</text>'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', title_line, *parts])
    return f"{head}\n{body}\n</svg>\n"


def _ticks(low: float, high: float) -> list[float]:
    """At least four ticks in a range: multiples of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (5, 2, 1) if span >= 4 * power * factor)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
