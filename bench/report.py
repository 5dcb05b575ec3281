"""Writes the results as `benchmarks.md`: medians over the rounds, with the smallest and largest beside.

A ratio is taken within each round and then its median, so what the machine did meanwhile is in both its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from bench.kept import Part
from bench.plot import plot_name
from bench.targets import BEST, CHAMPION, MEASUREMENTS, Measurement, Target

Rounds = Sequence[Mapping[str, float]]  # one side's figures, round by round; empty where it could not be measured
COMPARED = (  # five lines at most
    "**Ours**: the worker as it is installed, one process that sends 16 mails at once, or two with 8 each. The peers "
    "send 16 at once as well, in one process or two, but for those whose names say otherwise.",
    "**Naive peers**, what teams write first: an SMTP session for each mail. Celery as it comes (behind Flask, for "
    "accepting) and with 16 processes, dramatiq with threads, taskiq with aiosmtplib.",
    "**Warm peers**, what a good engineer makes of that: the same code with sessions that are kept, and opened anew "
    "once when they turn out dead; Celery also with threads, and BullMQ with nodemailer's pool.",
    "**The best peer** is the one of these, and of a worker of stock RQ, which ours is built on (**the floor**), with "
    "the highest median in that table. The ratio to it comes first.",
    "**Postfix** is the champion beside them: mail in by SMTP and out to the same relay, without a queue in Redis, "
    "templates or an API.",
)


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


def is_peer(side: str) -> bool:
    return not is_ours(side) and side != CHAMPION


def rival(target: Target, sides: Mapping[str, Rounds]) -> str:
    """Returns the side that a target compares with, and "" where there is none."""
    if target.other != BEST:
        return target.other
    theirs = {side: figures(rounds, target.figure) for side, rounds in sides.items() if is_peer(side)}
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


def section(name: str, parts: Sequence[Part]) -> Iterator[str]:
    """Yields one measurement, server by server."""
    measurement, measured = MEASUREMENTS[name], [part for part in parts if name in part.results]
    yield f"## {measurement.title}"
    yield measurement.words.format(**measured[-1].size)
    for part in measured:
        if len(parts) > 1:
            yield f"### {part.server}"
        yield from tables(measurement, part.results[name])


def tables(measurement: Measurement, sides: Mapping[str, Rounds]) -> Iterator[str]:
    rows = [
        [name, *(spread(figures(sides[side], one.key), one.form) for one in measurement.figures)]
        for side, name in measurement.sides.items()
        if side in sides
    ]
    yield table(["", *(one.heading for one in measurement.figures)], rows)
    rows = [verdict(target, sides, measurement) for target in measurement.targets]
    yield table(["compared", "measured", "target", ""], rows)


def verdict(target: Target, sides: Mapping[str, Rounds], measurement: Measurement) -> list[str]:
    values, words = ratios(target, sides), target.words
    if target.other == BEST:
        words = f"**{words}, to the best peer** ({measurement.sides.get(rival(target, sides), 'none')})"
    [own] = [one.form for one in measurement.figures if one.key == target.figure]
    form = ",.2f" if target.other else own
    if not target.relation:
        return [words, spread(values, form), "–", ""]
    judged = "not measured" if not values else "met" if target.is_met(median(values)) else "**missed**"
    return [words, spread(values, form), f"{target.relation} {target.limit:,.4g}", judged]


def document(parts: Sequence[Part]) -> str:
    """Returns the page, of one server or more."""
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    said = [
        "# Measured beside what teams write themselves",
        "\n".join(f"- {line}" for line in COMPARED),
        "The peers' code is in `bench/peers/`. `bench/run` builds everything, measures the sides in turn and writes "
        f"this page. Each figure is the median over {rounds(parts)}, with the smallest and the largest in brackets; "
        "each ratio is taken within a round. All rounds are in [benchmarks.jsonl](benchmarks.jsonl).",
        "\n".join(f"- {fact}" for fact in facts(parts)),
    ]
    for part in parts:
        if any(MEASUREMENTS[key].drawn for key in part.results):
            said.append(f"![Medians as bars, on {part.server}](img/{plot_name(parts, part)})")
    for name in MEASUREMENTS:
        if any(name in part.results for part in parts):
            said += section(name, parts)
    if notes:
        said += ["## Not measured", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(said) + "\n"


def facts(parts: Sequence[Part]) -> list[str]:
    """Returns what is true of all servers, then what is of one, with its name."""
    common = [fact for fact in dict.fromkeys(parts[0].facts) if all(fact in part.facts for part in parts)]
    own = [
        fact if part.server in fact else f"{part.server}: {fact}"
        for part in parts
        for fact in dict.fromkeys(part.facts)
        if fact not in common
    ]
    return common + own


def rounds(parts: Sequence[Part]) -> str:
    """Returns how many there are: `5 rounds`, or `3–5 rounds` where a server has fewer than another."""
    counts = {len(some) for part in parts for sides in part.results.values() for some in sides.values()} or {0}
    words = "–".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"{words} round{'s' if words != '1' else ''}"
