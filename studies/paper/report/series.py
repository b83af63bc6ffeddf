"""Series of means over seeds, with their standard errors, on the axes of a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from studies.paper.report.summary import Mean
from tangent_ops.pictures import Look


def draw_series(
    axes: Axes, look: Look, x: Sequence[float], means: Iterable[Mean], factor: float = 100
) -> float:
    """Draw means with their standard errors, accuracies in percent; return the last one drawn."""
    points = list(means)
    values = [factor * point.value for point in points]
    errors = [0.0 if math.isnan(point.error) else factor * point.error for point in points]
    axes.errorbar(x, values, errors, label=look.title, **look.drawn)
    return values[-1]
