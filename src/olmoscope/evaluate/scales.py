"""Axes of charts: where a value goes, which ticks there are, and how to write a value."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from olmoscope.units import format_count

Kind = Literal["number", "share", "count"]


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`; a logarithmic one has only positive values. `named` ticks replace those at round
    values."""

    label: str
    low: float
    high: float
    kind: Kind = "number"
    log: bool = False
    named: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """The position of a value: 0 at the low end, 1 at the high end; values outside are clipped to the ends."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self) -> list[tuple[float, str]]:
        """Values with their labels: three to six of them."""
        if self.named:
            return list(self.named)
        if self.log:
            return [(value, log_label(value, self.kind)) for value in self._decades()]
        step = round_step((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(number * step, self._tick(number * step, step)) for number in range(first, last + 1)]

    def _decades(self) -> list[float]:
        """Powers of ten: every nth if there are many, and also 2 and 5 times each if there are few."""
        first, last = _exponent(self.low), _exponent(self.high)
        factors = (1, 2, 5) if last - first < 2 else (1, 3) if last - first == 2 else (1,)
        every = -(-(last - first + 1) // 6)
        return [value for power in range(first, last + 1, every) for factor in factors
                if self.low * (1 - 1e-9) <= (value := factor * 10.0**power) <= self.high * (1 + 1e-9)]

    def say(self, value: float) -> str:
        """A value in full, for tooltips."""
        return say(value, self.kind)

    def _tick(self, value: float, step: float) -> str:
        if self.kind == "share":
            return f"{100 * value:.{_decimals(100 * step)}f}%"
        if abs(value) >= 1000 and step >= 10.0 ** (_exponent(value) - 2):  # three digits distinguish ticks
            return format_count(value)
        if step < 1e-3:
            return re.sub(r"e-0*", "e-", f"{value:.3g}")
        return f"{value:,.{_decimals(step)}f}"


def linear(label: str, values: Iterable[float], kind: Kind = "number", zero: bool = True) -> Axis:
    """An axis that holds all values and has round ends; it includes 0 if `zero`."""
    values = list(values)
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        high = 0.04 if kind == "share" else 1.0
    if high - low < 0.05 * abs(high):  # nearly equal values: show them as such, not magnified
        low, high = 0.975 * low, 1.025 * high
    step = round_step((high - low) / 4)
    return Axis(label, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, kind)


def exact(label: str, low: float, high: float, kind: Kind = "number") -> Axis:
    """An axis from exactly the first value to the last, such as the steps of a run."""
    return Axis(label, low, high if high > low else low + 1, kind)


def logarithmic(label: str, values: Iterable[float], kind: Kind = "number") -> Axis:
    """An axis that holds all values above 0; each end is 1, 2 or 5 times a power of ten."""
    positive = [value for value in values if value > 0] or [1.0]
    low = max(step for step in _one_two_five(min(positive)) if step <= min(positive) * (1 + 1e-9))
    high = min(step for step in _one_two_five(max(positive)) if step >= max(positive) * (1 - 1e-9))
    return Axis(label, low, high if high > low else 10 * low, kind, log=True)


def fitting(label: str, values: Iterable[float], kind: Kind = "number") -> Axis:
    """Logarithmic if all values are positive and the largest is over twenty times the smallest; else linear from 0."""
    values = list(values)
    return (logarithmic if min(values) > 0 and max(values) > 20 * min(values) else linear)(label, values, kind)


def round_step(about: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `about`."""
    power = 10.0 ** _exponent(about)
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= about * (1 - 1e-9))


def log_label(value: float, kind: Kind = "number") -> str:
    """`0.02`, `50%`, `1k`; a very large or small power of ten as `10⁻⁶`."""
    if kind == "share" and value >= 1e-4:
        return f"{100 * value:g}%"
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    if value >= 1e4:
        return format_count(value)
    factor = round(value / 10.0 ** _exponent(value))
    power = "10" + str(_exponent(value)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if factor == 1 else f"{factor}·{power}"


def say(value: float, kind: Kind = "number") -> str:
    """A value in readable form: `0.01234`, `1.23%`, `12,345`."""
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "share":
        return f"{100 * value:.3g}%" if 0 < abs(value) < 0.01 else f"{100 * value:.2f}%"
    if value == 0:
        return "0"
    digits = max(0, 3 - _exponent(abs(value)))
    return f"{value:,.{digits}f}" if 1e-4 <= abs(value) < 1e9 else f"{value:.3e}"


def _decimals(step: float) -> int:
    """How many decimals distinguish multiples of a round step: 2.5 needs one more than 2."""
    places = max(0, -_exponent(step))
    return places if math.isclose(step * 10**places, round(step * 10**places)) else places + 1


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)


def _one_two_five(near: float) -> list[float]:
    return [factor * 10.0 ** (_exponent(near) + power) for power in (-1, 0, 1) for factor in (1, 2, 5)]
