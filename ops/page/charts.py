"""Charts as SVG that goes into a page: lines, bars, and marks of what happened. Pure.

A hundred lines of our own, since the libraries that write SVG put style and script into it, which our Content Security
Policy forbids. Colours are classes of page.css. A reader that sees no picture is told the title and the last figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 180, 60, 10, 14, 24
FASTEST = 0.05  # seconds, at the foot of a scale of times
TIMES = {0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 6 * 3600: "6 h", 86400: "1 day"}


class Series(NamedTuple):
    """One figure over time, `None` where there is none. `name` is also the class of its colour."""

    name: str
    values: Sequence[float | None]
    as_bars: bool = False


class Scale(NamedTuple):
    """Where a value is drawn: `place` from 0, at the foot, to 1. `ticks` are values with their text."""

    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


def of_counts(most: float) -> Scale:
    """Returns a scale from 0 that ends at a round number."""
    step = 10 ** math.floor(math.log10(max(most, 1)))
    top = next(step * n for n in (1, 2, 4, 5, 10) if step * n >= most)
    marks = [top / 2, top] if top % 2 == 0 else [top]
    return Scale(lambda value: value / top, [(0, "0"), *((mark, f"{mark:,.0f}") for mark in marks)])


def of_times(most: float) -> Scale:
    """Returns a logarithmic scale of seconds: both a tenth of a second and an hour are seen."""
    top = next((mark for mark in TIMES if mark >= most), most)
    height = math.log(top / FASTEST)
    shown = [(mark, text) for mark, text in TIMES.items() if mark <= top]
    return Scale(lambda value: max(0.0, math.log(max(value, FASTEST) / FASTEST) / height), shown)


def chart(
    title: str,
    times: Sequence[float],
    series: Sequence[Series],
    *,
    marks: Sequence[tuple[float, str]] = (),
    in_time: bool = False,
) -> Markup:
    """Returns a `figure` of the series, each with a value for each of `times` (seconds since 1970, evenly apart).
    `marks` are moments and what happened then; `in_time` says that the values are seconds."""
    most = max((value for one in series for value in one.values if value is not None), default=0)
    scale = of_times(most) if in_time else of_counts(most)
    drawn = [*_grid(times, scale), *(_bars(one, scale) if one.as_bars else _line(one, scale) for one in series)]
    drawn += [_mark(times, at, text) for at, text in marks if times and times[0] <= at]
    picture = Markup(
        '<figure class="chart"><figcaption>{0}</figcaption>'
        '<svg viewBox="0 0 {1} {2}" role="img" aria-label="{3}">{4}</svg><ul class="legend">{5}</ul></figure>'
    )
    legend = Markup("").join(Markup('<li class="{0}">{0}</li>').format(one.name) for one in series)
    return picture.format(title, WIDTH, HEIGHT, _told(title, series, in_time), Markup("").join(drawn), legend)


def _told(title: str, series: Sequence[Series], in_time: bool) -> str:
    """Returns what a picture says, for who does not see it."""
    last = [(one.name, next((value for value in reversed(one.values) if value is not None), None)) for one in series]
    said = [f"{name} {f'{value:.2g} s' if in_time else f'{value:,.0f}'}" for name, value in last if value is not None]
    return f"{title}; at the end {', '.join(said)}" if said else f"{title}: no figures yet"


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(place: float) -> float:
    return round(HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM), 1)


def _grid(times: Sequence[float], scale: Scale) -> Iterator[Markup]:
    for value, text in scale.ticks:
        y = _y(scale.place(value))
        line = '<line class="grid" x1="{0}" y1="{2}" x2="{1}" y2="{2}"/><text class="value" x="{3}" y="{4}">{5}</text>'
        yield Markup(line).format(LEFT, WIDTH - RIGHT, y, LEFT - 8, y + 4, text)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0) if times else ():
        at = datetime.fromtimestamp(times[round(share * (len(times) - 1))]).astimezone()
        text = f"{at:%H:%M}" if times[-1] - times[0] < 86400 else f"{at:%a %H:%M}"
        place = {0.0: "start", 1.0: "end"}.get(share, "middle")
        yield Markup('<text class="time {}" x="{}" y="{}">{}</text>').format(place, _x(share), HEIGHT - 6, text)


def _line(one: Series, scale: Scale) -> Markup:
    """Draws a line, with a gap where there is no value, and a dot for a value alone."""
    line, dots = "", ""
    values = [None, *one.values, None]
    for number, value in enumerate(one.values):
        if value is None:
            continue
        place = f"{_x(number / max(1, len(one.values) - 1))} {_y(scale.place(value))}"
        before, after = values[number], values[number + 2]
        line += f"L{place}" if before is not None else f"M{place}" if after is not None else ""
        dots += f"M{place}h.1" if before is after is None else ""
    return Markup('<path class="line {0}" d="{1}"/><path class="dots {0}" d="{2}"/>').format(one.name, line, dots)


def _bars(one: Series, scale: Scale) -> Markup:
    steps = [
        f"M{_x(number / max(1, len(one.values) - 1))} {_y(0)}V{_y(scale.place(value))}"
        for number, value in enumerate(one.values)
        if value
    ]
    return Markup('<path class="bars {}" d="{}"/>').format(one.name, "".join(steps))


def _mark(times: Sequence[float], moment: float, text: str) -> Markup:
    x = _x(min(1.0, (moment - times[0]) / max(1.0, times[-1] - times[0])))
    line = '<line x1="{1}" y1="{2}" x2="{1}" y2="{3}"/><circle cx="{1}" cy="{2}" r="3.5"/>'
    said = f"{datetime.fromtimestamp(moment).astimezone():%d %b %H:%M}: {text}"
    return Markup('<g class="mark"><title>{0}</title>' + line + "</g>").format(said, x, TOP - 4, HEIGHT - BOTTOM)
