"""A result of the benchmarks as table, targets, pictures and docs.

    python -m benchmarks.report FILE...               # table and targets
    python -m benchmarks.report FILE... --plots DIR   # and pictures
    python -m benchmarks.report --docs                # docs from the newest result of each device

FILE is a JSON of ``--benchmark-json``, or a folder of them. The exit status is 1 if a target of the
same device is missed or an answer of ours is wrong, 2 if a file cannot be used.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarks.roofline import percent_of_floor
from benchmarks.stored import (
    OURS,
    Answers,
    BadFile,
    Result,
    Row,
    fastest_plain,
    folder,
    newest,
    our_row,
    ratio,
    read,
)
from benchmarks.targets import TARGETS, judge
from tools.machine import ROOT

DOCS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def digits(value: float) -> str:
    """Three significant ones, without an exponent: 1234, 123, 12.3, 1.23, 0.123."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def si(value: float, unit: str) -> str:
    """ "12.3 ms", "470 MB"."""
    size, prefix = next((one for one in PREFIXES if value >= one[0]), PREFIXES[-1])
    return f"{digits(value / size)} {prefix}{unit}" if value else f"0 {unit}"


def table(result: Result, groups: Collection[str] = ()) -> str:
    """Every case of these groups (none: of all) with its providers, and the circumstances."""
    parts, group = [], None
    for case, answers in result.by_case().items():
        if groups and case.group not in groups:
            continue
        if case.group != group:
            group = case.group
            parts.append(f"== {group}\n")
        timed = [row for row in answers.values() if row.seconds is not None]
        columns = _columns(answers, result)
        headings = [h for h, cell in columns.items() if any(cell(row) for row in timed)]
        lines = [(str(case), *headings)]
        lines += [(f"  {r.provider}", *(columns[h](r) or "" for h in headings)) for r in timed]
        others = [row for row in answers.values() if row.seconds is None]
        if groups:  # in the docs
            others = [row for row in others if row.status != "absent"]
        notes = [f"  {row.provider}: {row.status}: {row.note}" for row in others]
        parts.append("\n".join([*aligned(lines), *notes]) + "\n")
    limits = [f"{name} {digits(value / 1e9)}e9" for name, value in result.ceilings.items()]
    parts.append(f"limits of this machine: {', '.join(limits)}\n{result.conditions}")
    return "\n".join(parts)


def _columns(answers: Answers, result: Result) -> dict[str, Callable[[Row], str | None]]:
    """Heading to the cell of a timed row; None where there is nothing to say."""

    def rate(work: float, row: Row, unit: float) -> str | None:
        return digits(work / row.seconds / unit) if work and row.seconds else None

    def of_floor(row: Row) -> str | None:
        percent = percent_of_floor(row, result.ceilings)
        return f"{percent:.0f} %" if percent else None

    def over(row: Row, other: Row) -> str | None:
        times = ratio(row, other)
        return None if times is None else f"{times:.2f}"

    def known(value: float | None, unit: str) -> str | None:
        return None if value is None else si(value, unit)

    found: dict[str, Callable[[Row], str | None]] = {
        "median": lambda row: known(row.seconds, "s"),
        "quartiles": lambda row: f"{known(row.lower, 's')} to {known(row.upper, 's')}",
        "called": lambda row: known(row.called, "s"),
        "TFLOP/s": lambda row: rate(row.flops, row, 1e12),
        "GB/s": lambda row: rate(row.bytes, row, 1e9),
        "% floor": of_floor,
    }
    for other in (our_row(answers), fastest_plain(answers)):
        if other is not None:
            found[f"/ {other.provider}"] = lambda row, other=other: over(row, other)
    return found | {
        "error": lambda row: None if row.error is None else f"{row.error:.0e}",
        "peak": lambda row: known(row.peak_bytes, "B"),
        "saved": lambda row: known(row.saved_bytes, "B"),
    }


def targets_table(result: Result) -> str:
    """All targets: bound, worst value, verdict, and where."""
    found = [(target, judge(target, result)) for target in TARGETS]
    lines = [("Targets", "bound", "measured", "")]
    for target, one in found:
        value = "" if one.value is None else f"{one.value:.3f}"
        lines.append((target.name, f"{target.sense} {target.bound:.2f}", value, one.verdict))
    where = ["", *(one.where for _, one in found)]
    return "\n".join(f"{line}  {at}" for line, at in zip(aligned(lines), where, strict=True))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([head.ljust(first), *(c.rjust(n) for c, n in zip(cells, others, strict=True))])
        for head, *cells in lines
    ]


def misses(result: Result) -> list[str]:
    """What makes a run red: targets not met, and answers of ours that are wrong or failed."""
    missed = [f"not met: {one.name}" for one in TARGETS if judge(one, result).verdict == "not met"]
    broken = [
        f"{row.status}: {row.provider}, {row.case.group} {row.case}: {row.note}"
        for row in result.rows
        if row.provider in OURS and row.status in ("wrong", "failed")
    ]
    return broken + missed


MARKED = re.compile(
    r"(<!-- measured (?P<kind>\w+): (?P<groups>.+?) -->).*?(<!-- /measured -->)", re.DOTALL
)


def rewritten(text: str, results: Sequence[Result]) -> str:
    """The page with fresh tables between `<!-- measured KIND: GROUP ... -->` and its end.

    KIND is "cpu" or "gpu".
    """

    def fresh(marker: re.Match[str]) -> str:
        groups = marker["groups"].split()
        tables = [table(one, groups) for one in results if one.kind == marker["kind"]]
        body = "\n\n".join(f"```text\n{each}\n```" for each in tables) or "Not measured yet."
        return f"{marker[1]}\n{body}\n{marker[4]}"

    return MARKED.sub(fresh, text)


def write_docs() -> None:
    """Tables and pictures of docs/benchmarks.md, from the newest stored result of each device."""
    from benchmarks.plots import draw_all

    results = list(newest().values())
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for result in results:
        draw_all(result, DOCS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSON, or a folder")
    parser.add_argument(
        "--plots", type=folder, metavar="DIR", help="draw pictures into this folder"
    )
    parser.add_argument("--docs", action="store_true", help="write docs from the stored results")
    options = parser.parse_args(arguments)
    if bool(options.files) == options.docs:
        parser.error("name FILEs, or --docs")
    try:
        if options.docs:
            write_docs()
            return 0
        result = read(options.files)
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"{table(result)}\n\n{targets_table(result)}")
    if options.plots:
        from benchmarks.plots import draw_all  # matplotlib: a GPU machine may lack it

        print(*draw_all(result, options.plots), sep="\n")
    for line in (red := misses(result)):
        print(line, file=sys.stderr)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
