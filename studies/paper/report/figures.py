"""Plots that say the same in black and white: by markers and lines, not by colours alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.paper.report.summary import Mean

SIZE = (6.4, 4.2)
RESOLUTION = 150


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    title: str
    marker: str
    line: Any
    colour: str


def new_figure(columns: int = 1, size: tuple[float, float] = SIZE) -> tuple[Figure, Sequence[Axes]]:
    """A figure of axes side by side."""
    matplotlib.use("Agg")
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_series(
    axes: Axes, look: Look, x: Sequence[float], means: Iterable[Mean], factor: float = 100
) -> None:
    """Means with their standard errors; accuracies in percent."""
    points = list(means)
    axes.errorbar(
        x,
        [factor * point.value for point in points],
        [0.0 if math.isnan(point.error) else factor * point.error for point in points],
        label=look.title,
        marker=look.marker,
        linestyle=look.line,
        color=look.colour,
        markerfacecolor="white",
        capsize=2.5,
        linewidth=1.4,
        markersize=5.5,
    )


def draw_level(axes: Axes, title: str, mean: Mean, line: Any = (0, (1, 2))) -> None:
    """An accuracy that depends on nothing here."""
    axes.axhline(100 * mean.value, color="#555555", linestyle=line, linewidth=1.2, label=title)


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=RESOLUTION, metadata={"Software": None})
    return path
