"""Writes the results as `benchmarks.md` and its plot: medians over the rounds, with the smallest and largest beside.

A ratio is taken within each round and then its median, so what the machine did meanwhile is in both its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import median

from bench.targets import BEST, MEASUREMENTS, Measurement, Target

Rounds = Sequence[Mapping[str, float]]  # one side's figures, round by round; empty where it could not be measured
Results = Mapping[str, Mapping[str, Rounds]]  # by measurement and side
COMPARED = (  # five lines at most
    "**Ours**: the worker as it is installed, one process that sends 16 mails at once, and two of them.",
    "**Naive peers**, what teams write first: an SMTP session for each mail. Celery as it comes (behind Flask, for "
    "accepting) and with 16 processes, dramatiq with 16 threads.",
    "**Warm peers**, what a good engineer makes of that: the same code, with a session kept for each process or "
    "thread, opened anew once when it turns out dead. Celery with 16 processes and with 16 threads, dramatiq.",
    "**The floor**: one worker of stock RQ, which ours is built on, forking for each mail, or `SimpleWorker`, naive "
    "and warm.",
    "**The best peer** is the one of all of these with the highest median in that table. The ratio to it comes first.",
)
BAR, ROW, LEFT, WIDTH = 18, 26, 250, 760  # of the plot, in pixels


def spread(values: Sequence[float], form: str) -> str:
    """Returns `median (smallest–largest)`, and `–` where there is none."""
    if not values:
        return "–"
    middle, low, high = (format(value, form) for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def figures(rounds: Rounds, key: str) -> list[float]:
    return [one[key] for one in rounds if key in one]


def is_ours(side: str) -> bool:
    return side.startswith("ours")


def rival(target: Target, sides: Mapping[str, Rounds]) -> str:
    """Returns the side that a target compares with, and "" where there is none."""
    if target.other != BEST:
        return target.other
    theirs = {side: figures(rounds, target.figure) for side, rounds in sides.items() if not is_ours(side)}
    medians = {side: median(values) for side, values in theirs.items() if values}
    return max(medians, key=medians.__getitem__, default="")


def ratios(target: Target, sides: Mapping[str, Rounds]) -> list[float]:
    mine = [one.get(target.figure) for one in sides.get(target.side, [])]
    if not target.other:
        return [value for value in mine if value is not None]
    theirs = [one.get(target.against or target.figure) for one in sides.get(rival(target, sides), [])]
    return [value / other for value, other in zip(mine, theirs, strict=False) if value is not None and other]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(measurement: Measurement, sides: Mapping[str, Rounds], size: Mapping[str, object]) -> Iterator[str]:
    yield f"## {measurement.title}"
    yield measurement.words.format(**size)
    rows = [
        [name, *(spread(figures(sides[side], one.key), one.form) for one in measurement.figures)]
        for side, name in measurement.sides.items()
        if side in sides
    ]
    yield table(["", *(one.heading for one in measurement.figures)], rows)
    rows = [verdict(target, sides, measurement.sides) for target in measurement.targets]
    yield table(["compared", "measured", "target", ""], rows)


def verdict(target: Target, sides: Mapping[str, Rounds], names: Mapping[str, str]) -> list[str]:
    values, words = ratios(target, sides), target.words
    if target.other == BEST:
        words = f"**{words}, to the best peer** ({names.get(rival(target, sides), 'none')})"
    form = ",.2f" if target.other else ",.1f"
    judged = "not measured" if not values else "met" if target.is_met(median(values)) else "**missed**"
    return [words, spread(values, form), f"{target.relation} {target.limit:,.4g}", judged]


def document(results: Results, size: Mapping[str, object], facts: Sequence[str], notes: Sequence[str]) -> str:
    """Returns the page. `facts` says on what it was measured and how, `notes` what was not."""
    parts = [
        "# Measured beside what teams write themselves",
        "\n".join(f"- {line}" for line in COMPARED),
        "The peers' code is in `bench/peers/`. `bench/run` builds everything, measures the sides in turn and writes "
        "this page. Each figure is the median over the rounds, with the smallest and the largest in brackets; each "
        "ratio is taken within a round.",
        "\n".join(f"- {fact}" for fact in facts),
    ]
    if any(MEASUREMENTS[key].drawn for key in results):
        parts.append("![Medians as bars](img/benchmarks.svg)")
    for key, sides in results.items():
        parts += section(MEASUREMENTS[key], sides, size)
    if notes:
        parts += ["## Not measured", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


# --- the plot ---------------------------------------------------------------------------------------------------------

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2933 } .title { font-weight: 600 } .number { fill: #52606d }
.ours { fill: #2f7ed8 } .theirs { fill: #a0a8b3 } line { stroke: #1f2933; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7eb } .number { fill: #9aa5b1 } .theirs { fill: #616e7c } line { stroke: #e4e7eb }
}
"""


def plot(results: Results) -> str:
    """Draws bars to the median, and a line from the smallest to the largest. Each group has its own scale."""
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
    values = {side: figures(sides[side], measurement.drawn) for side in measurement.sides if side in sides}
    scale = (WIDTH - LEFT - 90) / max((max(some) for some in values.values() if some), default=1)
    for side, some in values.items():
        y += ROW
        yield f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(measurement.sides[side])}</text>'
        if some:
            yield from bar(some, scale, y, "ours" if is_ours(side) else "theirs")


def bar(values: Sequence[float], scale: float, y: int, who: str) -> Iterator[str]:
    middle, low, high = (scale * value for value in (median(values), min(values), max(values)))
    centre = y + BAR // 2
    yield f'<rect class="{who}" x="{LEFT}" y="{y}" width="{middle:.1f}" height="{BAR}" rx="2"/>'
    if low < high:
        yield f'<line x1="{LEFT + low:.1f}" x2="{LEFT + high:.1f}" y1="{centre}" y2="{centre}"/>'
    yield f'<text class="number" x="{LEFT + high + 8:.1f}" y="{y + 14}">{median(values):,.0f}</text>'
