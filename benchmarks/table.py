"""A result of the suite as tables in the terminal, a section for each case.

python -m benchmarks.table FILE...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.table import Table

from benchmarks.console import wide_console
from benchmarks.rivals import Answers, by_case, fastest_yardstick, our_row, ratio
from benchmarks.roofline import figures
from benchmarks.stored import conditions, show_files
from benchmarks.suite.case import Case
from benchmarks.suite.row import Result, Row
from benchmarks.units import amount, between, digits, duration

Column = Callable[[Row], str | None]


def print_table(console: Console, result: Result) -> None:
    """Prints every case, group by group, and the circumstances at the end."""
    group = None
    for case, answers in by_case(result.rows).items():
        if case.group != group:
            group = case.group
            console.rule(f"[bold]{group}", align="left")
        _print_case(console, case, answers, result.ceilings)
    limits = [f"{name} {digits(value / 1e9)}e9" for name, value in result.ceilings.items()]
    if limits:
        _print_line(console, f"limits of this machine: {', '.join(limits)}")
    _print_line(console, conditions(result))


def _print_case(
    console: Console, case: Case, answers: Answers, ceilings: Mapping[str, float]
) -> None:
    timed = [row for row in answers.values() if row.seconds is not None]
    columns = {
        heading: [column(row) for row in timed]
        for heading, column in _columns(answers, ceilings).items()
    }
    table = Table(title=str(case), title_justify="left", title_style="bold", box=None)
    table.add_column("")
    shown = [cells for cells in columns.values() if any(cells)]
    for heading, cells in columns.items():
        if any(cells):
            table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(timed):
        table.add_row(row.provider, *(cells[index] or "" for cells in shown))
    console.print(table)
    for row in answers.values():
        if row.seconds is None:
            _print_line(console, f" {row.provider}: {row.status}: {row.note}")
    console.print()


def _columns(answers: Answers, ceilings: Mapping[str, float]) -> dict[str, Column]:
    """Heading to the cell of a timed row; None where there is nothing to say."""
    mine, primal = our_row(answers), fastest_yardstick(answers)

    def speed(row: Row) -> str | None:
        found = figures(row, ceilings)
        return digits(found.tflops) if found and row.flops else None

    def traffic(row: Row) -> str | None:
        found = figures(row, ceilings)
        return digits(found.gigabytes) if found and row.bytes else None

    def of_floor(row: Row) -> str | None:
        found = figures(row, ceilings)
        return f"{found.percent:.0f} %" if found and found.percent else None

    def against(base: Row | None) -> Column:
        def cell(row: Row) -> str | None:
            times = ratio(row, base)
            return None if times is None else f"{times:.2f}"

        return cell

    found: dict[str, Column] = {
        "median": lambda row: None if row.seconds is None else duration(row.seconds),
        "quartiles": _quartiles,
        "called": _called,
        "TFLOP/s": speed,
        "GB/s": traffic,
        "% floor": of_floor,
    }
    if mine is not None:
        found[f"/ {mine.provider}"] = against(mine)
    if primal is not None:
        found[f"/ {primal.provider}"] = against(primal)
    return found | {
        "error": lambda row: None if row.error is None else f"{row.error:.0e}",
        "peak": lambda row: None if row.peak_bytes is None else amount(row.peak_bytes),
        "saved": lambda row: None if row.saved_bytes is None else amount(row.saved_bytes),
    }


def _quartiles(row: Row) -> str | None:
    best = row.graph or row.timing
    return None if best is None else between(best.lower, best.upper, best.median)


def _called(row: Row) -> str | None:
    """With Python and launches, where the median is that of a CUDA graph."""
    return None if row.graph is None or row.timing is None else duration(row.timing.median)


def _print_line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    return show_files(lambda result: print_table(wide_console(), result), __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
