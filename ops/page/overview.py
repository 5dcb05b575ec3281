"""The front page, `/mail/`: one sentence that says whether all is well, today beside yesterday, and the charts.

`?span=3d` shows the charts by the hour for three days in place of by the minute for two hours.
"""

from __future__ import annotations

from collections.abc import Sequence

from flask import Response, request
from markupsafe import Markup

from mail import figures
from mail.figures import Figures
from ops.condition import judge, oldest
from ops.facts import gather
from ops.page.charts import Series, chart
from ops.page.view import View

SPANS = {"2h": ("2 hours", "a minute"), "3d": ("3 days", "an hour")}
TILES = (  # what is counted today and yesterday, its name, and the search that shows it
    ("accepted", "accepted", "after:today"),
    ("sent", "sent", "after:today state:sent"),
    ("delayed", "times delayed", "state:delayed"),
    ("failed", "failed", "after:today state:failed"),
    ("unknown", "in doubt", "state:in-doubt"),
)
MARKS = 5  # of what the charts mark, so many are told in words
COUNTED = ("failed", "accepted", "sent")
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def show(view: View) -> Response:
    span = request.args.get("span", "2h")
    if span not in SPANS:
        span = "2h"
    redis, facts = view.redis, gather(view.outbox)
    periods = figures.minutes(redis, 120) if span == "2h" else figures.hours(redis, 72)
    today, yesterday = figures.days(redis)
    marks = [
        (one.at, f"{one.kind.replace('_', ' ').capitalize()} {one.text}".strip())
        for one in figures.marks(redis, periods[0].at)
    ]
    tiles = [(name, today[field], yesterday[field], query) for field, name, query in TILES]
    return view.render(
        "overview.html",
        "Overview",
        condition=judge(facts),
        tiles=tiles,
        waiting=facts.waiting,
        oldest=oldest(facts)[0],
        spans={one: name for one, (name, _) in SPANS.items()},
        span=span,
        charts=charts(periods, marks, SPANS[span][1]),
        marks=marks[-MARKS:],
    )


def charts(periods: Sequence[Figures], marks: Sequence[tuple[float, str]], each: str) -> list[Markup]:
    """Returns the four charts of these periods, of which each is `a minute` or `an hour`."""
    times = [one.at for one in periods]
    counted = [Series(name, [one.counts[name] for one in periods], name == "failed") for name in COUNTED]
    taken = [Series(name, [one.percentile(share) for one in periods]) for name, share in PERCENTILES.items()]
    depth, longest = ([one.counts.get(name) for one in periods] for name in ("depth", "oldest"))
    return [
        chart(f"Mails {each}", times, counted, marks=marks),
        chart("Time from accepted to sent", times, taken, marks=marks, in_time=True),
        chart("Mails in the queue", times, [Series("waiting", depth)], marks=marks),
        chart("How long the oldest of them has waited", times, [Series("oldest", longest)], marks=marks, in_time=True),
    ]
