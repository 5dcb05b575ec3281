"""Draws the results: a bar to each median, a line from the smallest to the largest, and the limit as a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import median

from bench.kept import Part
from bench.targets import MEASUREMENTS, Measurement

Rounds = Sequence[Mapping[str, float]]
BAR, ROW, LEFT, WIDTH = 18, 26, 270, 800  # in pixels
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2933 } .title { font-weight: 600 } .number { fill: #52606d }
.ours { fill: #2f7ed8 } .theirs { fill: #a0a8b3 } line { stroke: #1f2933; stroke-width: 1.5 }
.limit { stroke: #c2410c; stroke-dasharray: 5 4 } text.limit { fill: #c2410c; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7eb } .number { fill: #9aa5b1 } .theirs { fill: #616e7c } line { stroke: #e4e7eb }
  .limit { stroke: #fb923c } text.limit { fill: #fb923c }
}
"""


def plot_name(parts: Sequence[Part], part: Part) -> str:
    number = parts.index(part) + 1
    return f"benchmarks{number if number > 1 else ''}.svg"


def plot(results: Mapping[str, Mapping[str, Rounds]]) -> str:
    """Draws one server's results. Each group has its own scale."""
    parts, y = list[str](), 0
    for key, sides in results.items():
        measurement = MEASUREMENTS[key]
        if measurement.drawn:
            parts += group(measurement, sides, y)
            y += ROW * (len(sides) + 2)
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def group(measurement: Measurement, sides: Mapping[str, Rounds], y: int) -> Iterator[str]:
    [unit] = [one.heading for one in measurement.figures if one.key == measurement.drawn]
    yield f'<text class="title" x="0" y="{y + 18}">{escape(measurement.title)}: {escape(unit)}</text>'
    values = {
        side: [one[measurement.drawn] for one in sides[side] if measurement.drawn in one]
        for side in measurement.sides
        if side in sides
    }
    limit, words = measurement.limit or (0, "")
    scale = (WIDTH - LEFT - 90) / max(limit, *(max(some, default=0) for some in values.values()), 1)
    if limit:
        x = f"{LEFT + scale * limit:.1f}"
        yield f'<text class="limit" x="{x}" y="{y + 18}" text-anchor="end">limit: {words} = {limit:,.0f}</text>'
        yield f'<line class="limit" x1="{x}" x2="{x}" y1="{y + 22}" y2="{y + ROW * (len(values) + 1)}"/>'
    for side, some in values.items():
        y += ROW
        yield f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(measurement.sides[side])}</text>'
        if some:
            yield from bar(some, scale, y, "ours" if side.startswith("ours") else "theirs")


def bar(values: Sequence[float], scale: float, y: int, who: str) -> Iterator[str]:
    middle, low, high = (scale * value for value in (median(values), min(values), max(values)))
    centre = y + BAR // 2
    yield f'<rect class="{who}" x="{LEFT}" y="{y}" width="{middle:.1f}" height="{BAR}" rx="2"/>'
    if low < high:
        yield f'<line x1="{LEFT + low:.1f}" x2="{LEFT + high:.1f}" y1="{centre}" y2="{centre}"/>'
    yield f'<text class="number" x="{LEFT + high + 8:.1f}" y="{y + 14}">{median(values):,.0f}</text>'
