"""Charts as inline SVG for a page: lines, histograms, bars, points.

A chart is a string of markup without colours, fonts or scripts of its own: it has classes, and the page's style sheet
(report.css) styles `axis`, `grid`, `line`, `bar`, `dot`, `hit` for light and dark mode. Series n of a chart has the
class `sn`. Every mark that reacts to the pointer has a `<title>` with the exact values. All text is escaped.

The drawing is as wide as a column of the page, so that its text is as large as the page's, also on a phone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from olmoscope.evaluate.scales import Axis

WIDTH, HEIGHT = 380, 216
LEFT, RIGHT, TOP, BOTTOM = 52, 15, 24, 38
BAR_PITCH = 36
"""Height of a row of a bar chart."""
LABEL_LENGTH = 58
"""Characters of a bar's label that fit above it."""


@dataclass(frozen=True)
class Series:
    """A line: its name in tooltips, its number (which sets its colour, from 1), and its points in ascending order of
    x."""

    name: str
    number: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Counts:
    """A histogram's heights: one for each bin."""

    name: str
    number: int
    heights: Sequence[float]


@dataclass(frozen=True)
class Bar:
    """A bar with its interval, if it has one; `number` as in `Series`, 0 for a bar that only serves
    for comparison."""

    label: str
    number: int
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Point:
    """A point with a short label beside it and a name for its tooltip."""

    label: str
    name: str
    number: int
    x: float
    y: float


class _Frame:
    """The plotting area: maps data to pixels and draws the axes."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y

    def across(self, value: float) -> float:
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> Markup:
        """Grid, tick labels, and the names of both axes: that of y above its labels, that of x at its end."""
        parts = []
        for value, text in self.y.ticks():
            parts.append(Markup('<path class="grid" d="M{} {}H{}"/><text class="tick" x="{}" y="{}" '
                                'text-anchor="end">{}</text>').format(
                LEFT, _n(self.down(value)), WIDTH - RIGHT, LEFT - 6, _n(self.down(value) + 3.5), text))
        for value, text in self.x.ticks():
            parts.append(Markup('<path class="axis" d="M{} {}v4"/><text class="tick" x="{}" y="{}" '
                                'text-anchor="middle">{}</text>').format(
                _n(self.across(value)), HEIGHT - BOTTOM, _n(self.across(value)), HEIGHT - BOTTOM + 15, text))
        parts.append(Markup('<path class="axis" d="M{} {}H{}"/><text class="name" x="{}" y="{}">{}</text>'
                            '<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, 0, 11, self.y.label, WIDTH - RIGHT, HEIGHT - 5, self.x.label))
        return Markup("").join(parts)


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis, dots: bool = False,
          say_x: Callable[[float], str] | None = None) -> Markup:
    """Lines over a common x; the tooltip gives the values of all lines at the x nearest to the pointer.

    Args:
        title: what the chart shows, for screen readers.
        dots: mark each point.
        say_x: gives the text for an x in its tooltip; by default the axis' name and the value.
    """
    frame = _Frame(x, y)
    say_x = say_x or (lambda at: f"{x.label} {x.say(at)}")
    parts = [frame.axes()]
    for one in series:
        path = "L".join(f"{_n(frame.across(at))} {_n(frame.down(value))}" for at, value in one.points)
        parts.append(Markup('<path class="line s{}" d="M{}"/>').format(one.number, path))
        if dots:
            parts += [_dot(frame, one.number, *point, radius=2.6) for point in one.points]
    places = sorted({at for one in series for at, _ in one.points})
    for at, (left, right) in zip(places, _bands([frame.across(at) for at in places]), strict=True):
        here = [(one, value) for one in series for place, value in one.points if place == at]
        tip = "\n".join([say_x(at), *(_said(one.name, y.say(value), len(series)) for one, value in here)])
        marks = Markup("").join(_dot(frame, one.number, at, value) for one, value in here)
        parts.append(Markup('<g class="hit"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/>'
                            '<path class="hair" d="M{} {}V{}"/>{}</g>').format(
            tip, _n(left), TOP, _n(right - left), HEIGHT - TOP - BOTTOM, _n(frame.across(at)), TOP, HEIGHT - BOTTOM,
            marks))
    return _svg(title, parts)


def histogram(title: str, edges: Sequence[float], counts: Sequence[Counts], x: Axis, y: Axis,
              say_bin: Callable[[int], str]) -> Markup:
    """Bars for one set of counts, outlines for several.

    Args:
        edges: edges of the bins on x, one more than each set has heights.
        say_bin: gives the text for a bin's tooltip, by the bin's number; "" for a gap that is no bin.
    """
    frame = _Frame(x, y)
    floor = HEIGHT - BOTTOM
    parts = [frame.axes()]
    spans = [(frame.across(low), frame.across(high)) for low, high in pairwise(edges)]
    for one in counts:
        tops = [frame.down(height) for height in one.heights]
        if len(counts) == 1:
            parts += [_column(one.number, left, right, top, floor)
                      for (left, right), top in zip(spans, tops, strict=True) if top < floor]
        else:
            path = "".join(f"V{_n(top)}H{_n(right)}" for (_, right), top in zip(spans, tops, strict=True))
            parts.append(Markup('<path class="outline s{}" d="M{} {}{}V{}"/>').format(
                one.number, _n(spans[0][0]), floor, path, floor))
    for number, (left, right) in enumerate(spans):
        if not (holds := say_bin(number)):
            continue
        heights = (_said(one.name, y.say(one.heights[number]), len(counts)) for one in counts)
        tip = "\n".join([holds, *heights])
        parts.append(Markup('<g class="hit"><title>{}</title><rect class="shade" x="{}" y="{}" width="{}" '
                            'height="{}"/></g>').format(tip, _n(left), TOP, _n(right - left), floor - TOP))
    return _svg(title, parts)


def bars(title: str, rows: Sequence[Bar], x: Axis) -> Markup:
    """Horizontal bars, each with its label above and its value at its end; a thin line is its interval.

    Args:
        x: the axis of the values; it begins at 0 and is not drawn.
    """
    parts = []
    longest = WIDTH - 66
    for row, bar in enumerate(rows):
        top = row * BAR_PITCH + 17
        end = max(1.0, x.place(bar.value) * longest)
        reach = end
        tip = f"{bar.label}: {x.say(bar.value)}"
        whisker = Markup("")
        if bar.interval is not None:
            low, high = (x.place(value) * longest for value in bar.interval)
            reach = max(end, high)
            tip += f"\n95% interval {x.say(bar.interval[0])} to {x.say(bar.interval[1])}"
            whisker = Markup('<path class="whisker" d="M{} {}v8m0 -4H{}m0 -4v8"/>').format(_n(low), top + 1, _n(high))
        parts.append(Markup(
            '<g class="hit"><title>{}</title><rect x="0" y="{}" width="{}" height="{}"/><text class="label" x="0" '
            'y="{}">{}</text><path class="bar s{}" d="{}"/>{}<text class="value" x="{}" y="{}">{}</text></g>').format(
            tip, top - 15, WIDTH, BAR_PITCH - 4, top - 5,
            bar.label if len(bar.label) <= LABEL_LENGTH else bar.label[:LABEL_LENGTH - 1] + "…", bar.number,
            f"M0 {top}H{_n(end - 2)}q2 0 2 2v6q0 2 -2 2H0z" if end > 4 else f"M0 {top}H{_n(end)}v10H0z",
            whisker, _n(reach + 6), top + 9, x.say(bar.value)))
    return _svg(title, parts, height=len(rows) * BAR_PITCH, kind="bars")


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis, links: Sequence[Sequence[int]] = ()) -> Markup:
    """Labelled points; a label is placed where it overlaps no other point or label, if there is such a place.

    Args:
        links: for each line, the indices in `points` of the points that it joins, in this order.
    """
    frame = _Frame(x, y)
    places = [(frame.across(point.x), frame.down(point.y)) for point in points]
    parts = [frame.axes()]
    parts += [Markup('<path class="line s0" d="M{}"/>').format(
        "L".join(f"{_n(places[number][0])} {_n(places[number][1])}" for number in link)) for link in links]
    taken = list(places)
    for point, (across, down) in zip(points, places, strict=True):
        half = 3.5 * len(point.label)
        around = [(across, down - 9, "middle", across), (across + 8, down + 4, "start", across + 8 + half),
                  (across - 8, down + 4, "end", across - 8 - half), (across, down + 17, "middle", across)]
        others = [place for place in taken if place != (across, down)]
        text_x, text_y, anchor, centre = next(
            (place for place in around if all(abs(place[3] - x) + abs(place[1] - 4 - y) >= 14 for x, y in others)),
            around[0])
        taken.append((centre, text_y - 4))
        tip = f"{point.name}\n{x.label} {x.say(point.x)}\n{y.label} {y.say(point.y)}"
        parts.append(Markup('<g class="hit"><title>{}</title><circle cx="{}" cy="{}" r="12"/><circle class="dot s{}" '
                            'cx="{}" cy="{}" r="5"/><text class="label" x="{}" y="{}" text-anchor="{}">{}</text></g>'
                            ).format(tip, _n(across), _n(down), point.number, _n(across), _n(down), _n(text_x),
                                     _n(text_y), anchor, point.label))
    return _svg(title, parts)


def _svg(title: str, parts: Sequence[Markup], height: int = HEIGHT, kind: str = "plot") -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        kind, WIDTH, height, title, Markup("").join(parts))


def _dot(frame: _Frame, number: int, x: float, y: float, radius: float = 4) -> Markup:
    return Markup('<circle class="dot s{}" cx="{}" cy="{}" r="{}"/>').format(
        number, _n(frame.across(x)), _n(frame.down(y)), radius)


def _column(number: int, left: float, right: float, top: float, floor: float) -> Markup:
    """A bar of a histogram, with rounded upper corners, and with gaps to its neighbours if there is room."""
    gap = 1.0 if right - left > 5 else 0.25 if right - left > 1.5 else 0.0
    left, right = left + gap, right - gap
    round_by = min(2.5, (right - left) / 2, floor - top)
    return Markup('<path class="bar s{}" d="M{} {}V{}q0 {} {} {}H{}q{} 0 {} {}V{}z"/>').format(
        number, _n(left), _n(floor), _n(top + round_by), _n(-round_by), _n(round_by), _n(-round_by),
        _n(right - round_by), _n(round_by), _n(round_by), _n(round_by), _n(floor))


def _bands(places: Sequence[float]) -> list[tuple[float, float]]:
    """For each horizontal position, the pixels that are nearer to it than to its neighbours."""
    edges = [float(LEFT), *((left + right) / 2 for left, right in pairwise(places)), float(WIDTH - RIGHT)]
    return list(pairwise(edges))


def _said(name: str, value: str, of: int) -> str:
    return value if of == 1 else f"{name}  {value}"


def _n(pixels: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{pixels:.1f}".removesuffix(".0")
