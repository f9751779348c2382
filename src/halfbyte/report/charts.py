"""Charts without a library: SVG for shapes, HTML for text.

A drawing is a square of 1000 x 1000 that is stretched to the available space, with lines of
constant width; names and numbers are HTML next to it, positioned in percent. So charts are sharp
and legible on a phone as on a desktop, without a script. Each has a text description for screen
readers and a table of its values. A script (``page.js``) shows the value under the pointer.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean
from typing import Literal

from halfbyte.report.curve import Point
from halfbyte.report.live import size

COLORS = 8
_DRAWN = 400  # points of a curve; longer ones are drawn by means of neighbours
_TABLE_ROWS = 40
_TICKS = 4

Say = Callable[[float], str]


def plain(value: float) -> str:
    """Four significant digits, with an exponent only for very large or small numbers."""
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        shown = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return shown
    return f"{value:.3g}"


def memory(value: float) -> str:
    """Bytes."""
    return size(value)


@dataclass(frozen=True)
class Series:
    """A curve, or dots.

    Attributes:
        name: As in the legend.
        points: (x, y), x ascending.
        color: Which of the page's colours.
        style: A line, a thin pale line behind others, or dots.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    style: Literal["line", "faint", "dots"] = "line"


def thinned(points: Sequence[Point], limit: int = _DRAWN) -> list[Point]:
    """At most ``limit`` points, each the mean of several."""
    if len(points) <= limit:
        return list(points)
    edges = [len(points) * i // limit for i in range(limit + 1)]
    shares = [points[a:b] for a, b in pairwise(edges)]
    return [(share[-1][0], fmean(y for _, y in share)) for share in shares]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The exponential mean over about a sixteenth of a curve, at most 20 points of it."""
    mean, found = 0.0, []
    weight = 1 - 1 / min(20.0, max(1.0, len(points) / 16))
    for count, (x, y) in enumerate(points, 1):
        mean = weight * mean + (1 - weight) * y
        found.append((x, mean / (1 - weight**count)))  # with bias correction
    return found


def ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, 1, 2 or 5 times a power of ten."""
    scale = max(abs(low), abs(high))
    if scale < 1e-250:
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * scale:  # a flat curve, in the middle
        low, high = low - 0.05 * scale, high + 0.05 * scale
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(i * step, 12) if step >= 1e-9 else i * step for i in range(first, last + 1)]


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, label: str = ""
) -> str:
    """A table that scrolls if it is too wide; the first cell of a row is its header.

    Args:
        heads: The columns' names.
        rows: The cells of each row.
        caption: Shown above.
        label: Name of the table for screen readers, if it has no caption.
    """
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(caption or label)}">'
        f"<table>{named}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(title: str, unit: str, body: str, values: str, legend: Sequence[Series] = ()) -> str:
    keys = "".join(
        f'<li class="c{one.color % COLORS} {one.style}">{escape(one.name)}</li>' for one in legend
    )
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong> "
        f'<span class="unit">{escape(unit)}</span></figcaption>'
        + (f'<ul class="legend">{keys}</ul>' if len(legend) > 1 else "")
        + body
        + f"<details><summary>Values</summary>{values}</details></figure>"
    )


def line_chart(
    title: str, unit: str, series: Sequence[Series], *, say: Say = plain, from_zero: bool = False
) -> str:
    """Curves over steps; nothing where there is no point.

    Args:
        title: The quantity drawn.
        unit: Unit of y.
        series: The curves; later ones are drawn on top.
        say: Writes a value of y.
        from_zero: Whether the axis starts at zero.
    """
    drawn = [Series(s.name, thinned(s.points), s.color, s.style) for s in series if s.points]
    if not drawn:
        return ""
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points] + ([0.0] if from_zero else [])
    y_ticks = ticks(min(ys), max(ys))
    left, right = min(0.0, *xs), max(max(xs), 1.0)
    bottom, top = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return 1000 * (x - left) / (right - left)

    def y_at(y: float) -> float:
        return 1000 - 1000 * (y - bottom) / (top - bottom)

    grid = "".join(f"M0 {y_at(y):.0f}H1000" for y in y_ticks)
    paths = []
    for one in drawn:
        places = [f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in one.points]
        # A dot is a line of length 0 with round ends, which stay round when stretched.
        line = "".join(f"M{at}h0" for at in places)
        if one.style != "dots" and len(places) > 1:
            line = "M" + "L".join(places)
        kind = "dots" if len(places) == 1 else one.style
        paths.append(f'<path class="{kind} c{one.color % COLORS}" d="{line}"/>')
    x_ticks = [x for x in ticks(left, right, 5) if x <= right and x == int(x)]
    hover = [
        {"name": s.name, "color": s.color % COLORS, "at": [[x, y, say(y)] for x, y in s.points]}
        for s in drawn
        if s.style != "faint"
    ]
    message = "; ".join(
        f"{one.name} from {say(one.points[0][1])} to {say(one.points[-1][1])}, lowest "
        f"{say(min(y for _, y in one.points))}, highest {say(max(y for _, y in one.points))}"
        for one in drawn
        if one.style != "faint"
    )
    labels = "".join(
        f'<span style="bottom:{(1000 - y_at(y)) / 10:.1f}%">{escape(say(y))}</span>'
        for y in y_ticks
    )
    steps = "".join(f'<span style="left:{x_at(x) / 10:.1f}%">{x:,.0f}</span>' for x in x_ticks)
    widest = max(len(say(y)) for y in y_ticks)
    body = (
        f'<div class="plot" style="--labels:{widest}ch" data-range="[{left},{right}]" '
        f'data-series="{escape(json.dumps(hover, ensure_ascii=False))}">'
        f'<div class="y" aria-hidden="true">{labels}</div><div class="area">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title}, {unit}, over steps: {message}")}">'
        f'<path class="grid" d="{grid}"/>{"".join(paths)}</svg></div>'
        f'<div class="x" aria-hidden="true">{steps}<b>step</b></div></div>'
    )
    # One curve has its dots in the legend; of several, dots are of the curve of their colour.
    several = sum(one.style == "line" for one in drawn) > 1
    legend = [one for one in drawn if not several or one.style == "line"]
    return _figure(title, unit, body, _values(title, drawn, say), legend)


def _values(title: str, series: Sequence[Series], say: Say) -> str:
    found = [(s.name, dict(thinned(s.points, _TABLE_ROWS))) for s in series]
    steps = sorted({x for _, values in found for x in values})
    rows = [
        [f"{x:,.0f}", *(say(values[x]) if x in values else "" for _, values in found)]
        for x in steps
    ]
    return table(["step", *(name for name, _ in found)], rows, label=f"{title}, values")


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: its name, and stacked parts."""

    name: str
    parts: Sequence[tuple[str, float]]

    @property
    def total(self) -> float:
        """The length of the bar."""
        return sum(value for _, value in self.parts)


def bar_chart(title: str, unit: str, bars: Sequence[Bar], *, say: Say = plain) -> str:
    """Bars from zero, each in parts; parts of one name have one colour. Nothing where all are 0."""
    longest = max((bar.total for bar in bars), default=0.0)
    if longest <= 0:
        return ""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts))
    rows = []
    for bar in bars:
        parts = "".join(
            f'<i class="c{names.index(name) % COLORS}" style="width:{100 * value / longest:.2f}%" '
            f'title="{escape(f"{name}: {say(value)}")}"></i>'
            for name, value in bar.parts
            if value > 0
        )
        rows.append(
            f'<div class="bar"><span>{escape(bar.name)}</span><div class="track">{parts}</div>'
            f"<b>{escape(say(bar.total))}</b></div>"
        )
    several = len(names) > 1
    legend = [Series(name, (), number) for number, name in enumerate(names)]
    message = "; ".join(f"{bar.name} {say(bar.total)}" for bar in bars)
    values = table(
        ["bar", *(names if several else []), "total"],
        [
            [
                bar.name,
                *([say(dict(bar.parts).get(name, 0.0)) for name in names] if several else []),
                say(bar.total),
            ]
            for bar in bars
        ],
        label=f"{title}, values",
    )
    body = f'<div class="bars" role="img" aria-label="{escape(message)}">{"".join(rows)}</div>'
    return _figure(title, unit, body, values, legend)


def dot_chart(
    title: str, unit: str, rows: Sequence[tuple[str, Sequence[float]]], *, say: Say = plain
) -> str:
    """A row of dots for each name, one per seed, and a bar at their mean."""
    values = [value for _, found in rows for value in found]
    if not values:
        return ""
    marks = ticks(min(values), max(values))
    low, high = marks[0], marks[-1]

    def at(value: float) -> str:
        return f"left:{100 * (value - low) / (high - low):.2f}%"

    lines = "".join(
        f'<div class="bar"><span>{escape(name)}</span><div class="track dotted">'
        + "".join(f'<i class="dot c0" style="{at(v)}" title="{escape(say(v))}"></i>' for v in found)
        + (f'<i class="mean" style="{at(fmean(found))}"></i>' if found else "")
        + f"</div><b>{escape(say(fmean(found)) if found else '–')}</b></div>"
        for name, found in rows
    )
    axis = "".join(f'<span style="{at(one)}">{escape(say(one))}</span>' for one in marks[::2])
    message = "; ".join(f"{name}: {', '.join(map(say, found)) or 'none'}" for name, found in rows)
    body = (
        f'<div class="bars" role="img" aria-label="{escape(message)}">{lines}'
        f'<div class="bar axis" aria-hidden="true"><span></span><div class="track">{axis}</div>'
        "<b></b></div></div>"
    )
    seeds = max(len(found) for _, found in rows)
    cells = [[name, *(say(v) for v in found), *[""] * (seeds - len(found))] for name, found in rows]
    heads = ["name", *(f"run {i + 1}" for i in range(seeds))]
    return _figure(title, unit, body, table(heads, cells, label=f"{title}, values"))
