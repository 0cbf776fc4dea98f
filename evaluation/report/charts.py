"""Line charts and bars as SVG and HTML, small enough that a phone shows them at their own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evaluation.report.markup import Markup, element, joined, text

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 34
_DOTTED = 60  # points of a line, at most, that each have a mark


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A named curve. style: of its stroke, line-0 is the accent. A nameless line is not in the legend."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "line-0"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str = "",
    y_limits: tuple[float, float] | None = None,
    x_limits: tuple[float, float] | None = None,
    from_zero: bool = False,
    dots: Sequence[tuple[float, float, str]] = (),
) -> Markup:
    """Return a figure with a legend; "" without a point. x, y: what the axes show. dots: x, y, and what they say.

    from_zero: whether the y axis begins there. Otherwise positive values that span more than a factor of 20 are on a
    logarithmic scale, which the caption says.
    """
    lines = [line for line in lines if len(line.xs)]
    if not lines:
        return Markup("")
    low_x, high_x = x_limits or _limits([place for line in lines for place in line.xs])
    values = [value for line in lines for value in line.ys]
    if from_zero:
        y_limits = _rounded(*_limits([0.0, *(values if any(values) else [1.0])]))
    is_log = y_limits is None and min(values) > 0 and max(values) > 20 * min(values)
    low, high = y_limits or ((min(values), max(values)) if is_log else _rounded(*_limits(values)))

    def across(place: float) -> float:
        return _LEFT + (place - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in _log_ticks(low, high) if is_log else _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    smallest = 1.0 if all(float(place).is_integer() for line in lines for place in line.xs) else 0.0
    for place in _ticks(low_x, high_x, smallest):
        parts.append(
            f'<text x="{across(place):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{place:g}</text>'
        )
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end" class="axis">{text(x)}</text>')
    for line in lines:
        points = [(across(place), up(value)) for place, value in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        hint = f"<title>{text(line.name)}</title>" if line.name else ""
        parts.append(f'<polyline class="{text(line.style)}" points="{path}">{hint}</polyline>')
        if line.name and len(points) <= _DOTTED:
            for (px, py), place, value in zip(points, line.xs, line.ys, strict=True):
                hint = f"<title>{text(line.name)}: {value:.4g} at {text(x)} {place:g}</title>"
                parts.append(f'<circle class="{text(line.style)}" cx="{px:.1f}" cy="{py:.1f}" r="2.5">{hint}</circle>')
    for place, value, said in dots:
        parts.append(f'<circle class="dot" cx="{across(place):.1f}" cy="{up(value):.1f}" r="5"/>')
        drawn = [[(across(a), up(b)) for a, b in zip(line.xs, line.ys, strict=True)] for line in lines]
        left, base = _free_place(across(place), up(value), said, drawn)
        parts.append(f'<text class="said" x="{left:.1f}" y="{base:.1f}">{text(said)}</text>')
    label = text(f"{title}: {y or 'value'} over {x}")
    svg = Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')
    named = [line for line in lines if line.name]
    keys = joined(element("span", element("i", class_=f"key {line.style}"), line.name) for line in named)
    said_y = ", ".join(filter(None, (y, "log scale" if is_log else "")))
    legend = element("div", keys, class_="legend") if len(named) > 1 else ""
    caption = element("figcaption", element("b", title), element("small", said_y) if said_y else "")
    return element("figure", caption, svg, legend, class_="chart")


def _free_place(x: float, y: float, said: str, curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Return left and baseline of a dot's label where it lies on the fewest curves; the last ones count most."""
    width = 6.5 * len(said)
    places = [
        (left, base)
        for base in (max(y - 8, 12), min(y + 17, _HEIGHT - _BOTTOM - 3))
        for left in (x + 9, x - 9 - width)
        if _LEFT <= left <= _WIDTH - width
    ]

    def crossed(at: tuple[float, float]) -> list[bool]:
        return [
            any(
                at[0] - 3 <= first[0] <= at[0] + width + 3
                and min(first[1], second[1]) < at[1] + 5
                and max(first[1], second[1]) > at[1] - 12
                for first, second in pairwise(curve)
            )
            for curve in curves
        ]

    best = min(places, key=lambda at: (crossed(at)[-1], sum(crossed(at))), default=(x + 9, max(y - 8, 12)))
    return (min(best[0], _WIDTH - width), best[1])


def bars(rows: Sequence[tuple[str, float, str, str]], *, longest: float) -> Markup:
    """Return rows of name, value, the value as text, and an explanation. longest: the value of a full bar."""
    drawn = []
    for name, value, said, explanation in rows:
        width = f"width:{100 * min(1.0, value / longest) if longest > 0 else 0:.1f}%"
        bar = element("span", element("i", style=width), class_="bar")
        drawn.append(element("div", element("b", name), bar, element("span", said), element("small", explanation)))
    return element("div", *drawn, class_="bars")


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Return the limits moved outwards to ticks, and to 0 if that is near."""
    low = 0.0 if 0 < low < high / 2 else low
    step = _step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """Return at most seven round numbers between two, at least `smallest` apart."""
    step = max(_step(low, high), smallest)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _step(low: float, high: float) -> float:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return numbers that begin with 1, or with 1, 2 and 5 if there are few of these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) <= 6 else [tick for tick in inside if f"{tick:e}".startswith("1")]
