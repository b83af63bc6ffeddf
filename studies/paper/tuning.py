"""Options are chosen on validation images, from a grid that grows until the best is inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MOST_WIDENINGS = 3


@dataclass(frozen=True)
class Choice(Generic[T]):
    """One option's value, chosen.

    Attributes:
        value: The chosen one.
        result: What was made with it.
        tried: Value -> score on validation images, ascending by value. If the chosen one is at an
            end, the page says so (`studies.paper.report.edges`).
    """

    value: float
    result: T
    tried: dict[float, float]

    def told(self) -> dict[str, Any]:
        """For a cell's result."""
        tried = [[value, score] for value, score in self.tried.items()]
        return {"chosen": self.value, "tried": tried}


def choose(
    grid: Sequence[float],
    make: Callable[[float], tuple[float, T]],
    *,
    limits: tuple[float, float] = (0.0, float("inf")),
) -> Choice[T]:
    """The value that scores best; of several that do, the middle one.

    Args:
        grid: Ascending, two or more; as long as the best is at an end, the grid is continued there
            by the ratio of the last two, up to `MOST_WIDENINGS` times in all. Whole numbers are
            continued by whole numbers, as long as they are 1 or more.
        make: Value -> score on validation images (the higher, the better), and what was made.
        limits: The grid is not continued beyond these.
    """
    made = {value: make(value) for value in grid}
    for _ in range(MOST_WIDENINGS):
        beyond = _beyond(sorted(made), _best(made), limits)
        if beyond is None:
            break
        made[beyond] = make(beyond)
    made = dict(sorted(made.items()))
    best = _best(made)
    return Choice(best, made[best][1], {value: score for value, (score, _) in made.items()})


def _best(made: dict[float, tuple[float, Any]]) -> float:
    highest = max(score for score, _ in made.values())
    tied = sorted(value for value, (score, _) in made.items() if score == highest)
    return tied[len(tied) // 2]


def _beyond(values: list[float], best: float, limits: tuple[float, float]) -> float | None:
    """The next value beyond the end that the best one is at; None if it is at none."""
    if best == values[-1]:
        following = values[-1] * values[-1] / values[-2]
    elif best == values[0]:
        following = values[0] * values[0] / values[1]
    else:
        return None
    if all(isinstance(value, int) for value in values) and following >= 1:
        following = round(following)
    else:
        following = round_(following)
    return following if limits[0] <= following <= limits[1] else None


def round_(value: float) -> float:
    """To two digits: grids are read by people."""
    return float(f"{value:.2g}")
