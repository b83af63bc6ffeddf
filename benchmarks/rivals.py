"""The rows of one case side by side, and who is compared with whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.suite.case import Case
from benchmarks.suite.row import Row

OURS = ("ours", "taft-all")  # of an op, of a model
Answers = Mapping[str, Row]  # by provider


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    """Rows by case, then by provider, in the order they were measured."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.case, {})[row.provider] = row
    return found


def yardstick(row: Row) -> bool:
    """Whether its provider is PyTorch's ordinary computation, without a tangent."""
    return row.provider.startswith("sdpa-") or row.provider in ("plain", "finetune")


def fastest_yardstick(answers: Answers) -> Row | None:
    """The fastest of those that were timed."""
    timed = [row for row in answers.values() if yardstick(row) and row.seconds is not None]
    return min(timed, key=lambda row: row.seconds or 0.0, default=None)


def our_row(answers: Answers) -> Row | None:
    """The library's own, where it was timed."""
    mine = [answers[name] for name in OURS if name in answers]
    return next((row for row in mine if row.seconds is not None), None)


def ratio(row: Row, base: Row | None) -> float | None:
    """How many times the base's seconds; None where one was not timed."""
    if base is None or row.seconds is None or base.seconds is None:
        return None
    return row.seconds / base.seconds
