"""The last hour as lines, drawn on the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from loom.http.metrics import BOUNDS
from loom.traffic import Traffic

WIDTH, HEIGHT = 300.0, 72.0
Minutes = Sequence[Traffic | None]
Values = list[float | None]


@dataclass(frozen=True)
class Line:
    """A line of a chart: `path` for SVG, `now` the last value that there is, as text."""

    name: str
    path: str
    now: str


@dataclass(frozen=True)
class Chart:
    """`top`: the value of the upper edge, as text. `summary`: what who cannot see it is told."""

    title: str
    lines: list[Line]
    top: str
    summary: str

    @property
    def empty(self) -> bool:
        return not any(line.path for line in self.lines)


def hour(traffic: Mapping[str, Minutes], seconds: float) -> list[Chart]:
    """The charts of the overview. `seconds`: how much of the last minute, which is under way, has passed."""
    every: Minutes = [_sum(minutes) for minutes in zip(*traffic.values(), strict=True)]
    plain, acquire = traffic.get("request", ()), traffic.get("acquire", ())
    rates: Values = [
        0.0 if each is None else each.requests / (60 if n < len(every) - 1 else max(seconds, 10.0))
        for n, each in enumerate(every)
    ]
    return [
        _chart("Requests per second", _rate, {"": rates} if every else {}),
        _chart("Answer time", _time, _times(plain)),
        _chart("Time to acquire a lock", _time, _times(acquire)),
    ]


def _sum(minutes: Sequence[Traffic | None]) -> Traffic | None:
    found: Traffic | None = None
    for each in minutes:
        found = each if found is None else found if each is None else found + each
    return found


def _times(minutes: Minutes) -> dict[str, Values]:
    return {
        "mean": [None if each is None else each.seconds / each.requests for each in minutes],
        "95 %": [None if each is None else quantile(each.counts, 0.95) for each in minutes],
    }


def quantile(counts: Sequence[int], part: float) -> float:
    """The time within which this part of the requests was answered, as if each bucket's were spread evenly over it."""
    wanted, seen = part * sum(counts), 0
    for count, lower, upper in zip(counts, (0.0, *BOUNDS), (*BOUNDS, 2 * BOUNDS[-1]), strict=True):
        if count and seen + count >= wanted:
            return lower + (upper - lower) * (wanted - seen) / count
        seen += count
    return 0.0


def _chart(title: str, text: Callable[[float], str], values: Mapping[str, Values]) -> Chart:
    known = [value for line in values.values() for value in line if value is not None]
    top = _round_up(max(known, default=0.0))
    lines = [Line(name, _path(line, top), text(next(_backwards(line), 0.0))) for name, line in values.items()]
    said = ", ".join(f"{line.name} {line.now} now".strip() for line in lines)
    summary = f"{title} in the last hour: {said}, at most {text(max(known))}." if known else f"{title}: no data."
    return Chart(title, lines if known else [], text(top), summary)


def _backwards(line: Values) -> Iterator[float]:
    return (value for value in reversed(line) if value is not None)


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * 0.999)


def _path(line: Values, top: float) -> str:
    """The line as a path; it is broken where there is no value. A single value is a short stroke."""
    step, found, drawing = WIDTH / max(1, len(line) - 1), [], False
    for n, value in enumerate(line):
        if value is not None:
            y = HEIGHT - 1 - (HEIGHT - 2) * min(1.0, value / top)
            found.append(f"{'L' if drawing else 'M'}{n * step:.1f} {y:.1f}")
            alone = not drawing and (n + 1 == len(line) or line[n + 1] is None)
            if alone:
                found.append(f"H{max(0.0, n * step - 2):.1f}")
        drawing = value is not None
    return "".join(found)


def _rate(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 10 else f"{value:.1f}/s" if value else "0/s"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
