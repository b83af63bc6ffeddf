"""Positions of dots, lines and cells in charts, in percent of the chart's width and height."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tangent_ops.shards.scoring import Estimate

_STEPS = 4  # of an axis, at least two and at most one more than these
_DECADE = 10.0  # values that span more are drawn on a logarithmic axis


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """An estimate: its place, and that of the bar from one standard error below to one above."""

    name: str
    at: float
    low: float
    width: float
    label: str


@dataclass(frozen=True)
class DotPlot:
    """Estimates in rows over one axis, which need not begin at zero."""

    dots: list[Dot]
    ticks: list[Tick]


@dataclass(frozen=True)
class Curve:
    """A line: SVG's path in a square of 100 by 100, whose origin is above on the left."""

    name: str
    path: str
    label: str


@dataclass(frozen=True)
class Plot:
    """Values by epoch.

    Attributes:
        curves: one for each shard.
        ticks: of the vertical axis, from below.
        epochs: number of values of the longest curve.
        logarithmic: whether the vertical axis is.
    """

    curves: list[Curve]
    ticks: list[Tick]
    epochs: int
    logarithmic: bool


def dot_plot(
    estimates: Mapping[str, Estimate],
    show: Callable[[float], str],
    label: Callable[[Estimate], str],
    *,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> DotPlot:
    """Lay estimates out.

    Args:
        estimates: by name, at least one.
        show: a tick's value as text.
        label: an estimate as text.
        limits: the axis does not pass these.
    """
    ends = [(one.value - one.error, one.value + one.error) for one in estimates.values()]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    values = _round_values(max(low, limits[0]), min(high, limits[1]), limits)
    place = _placed(values[0], values[-1])
    dots = []
    for (name, one), (low, high) in zip(estimates.items(), ends, strict=True):
        left, right = place(max(low, limits[0])), place(min(high, limits[1]))
        dots.append(Dot(name, place(one.value), left, right - left, label(one)))
    return DotPlot(dots, [Tick(place(value), show(value)) for value in values])


def plot(series: Mapping[str, Sequence[float]], show: Callable[[float], str]) -> Plot | None:
    """Lay values by epoch out; None if there are none.

    Args:
        series: values by name.
        show: a value as text.
    """
    given = {name: [v for v in values if math.isfinite(v)] for name, values in series.items()}
    given = {name: values for name, values in given.items() if values}
    if not given:
        return None
    low, high = (pick(map(pick, given.values())) for pick in (min, max))
    logarithmic = low > 0 and high > _DECADE * low
    scale = math.log10 if logarithmic else float
    values = _decades(low, high) if logarithmic else _round_values(low, high)
    place = _placed(scale(values[0]), scale(values[-1]))
    epochs = max(map(len, given.values()))
    across = _placed(0, max(epochs - 1, 1))
    curves = []
    for name, own in given.items():
        points = [f"{across(x):.2f} {100 - place(scale(y)):.2f}" for x, y in enumerate(own)]
        path = "M" + " L".join(points) + (" h0" if len(points) == 1 else "")
        label = show(own[0]) if len(own) == 1 else f"{show(own[0])} → {show(own[-1])}"
        curves.append(Curve(name, path, label))
    ticks = [Tick(place(scale(value)), show(value)) for value in values]
    return Plot(curves, ticks, epochs, logarithmic)


def _placed(low: float, high: float) -> Callable[[float], float]:
    return lambda value: 100 * (value - low) / (high - low)


def _round_values(
    low: float, high: float, limits: tuple[float, float] = (-math.inf, math.inf)
) -> list[float]:
    """Round numbers that enclose two numbers, evenly spaced, within limits."""
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-2):
        some = 0.02 * max(abs(low), 0.5)
        low, high = max(low - some, limits[0]), min(high + some, limits[1])
    step = 10.0 ** math.floor(math.log10((high - low) / _STEPS))
    while (high - low) / step > _STEPS:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]
