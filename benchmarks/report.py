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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.roofline import percent_of_floor
from benchmarks.stored import (
    OURS,
    BadFile,
    Result,
    Row,
    fastest_plain,
    folder_for,
    newest,
    our_row,
    plain,
    ratio,
    read,
)
from benchmarks.targets import TARGETS, judge
from benchmarks.units import amount, between, digits, duration

DOCS = ROOT / "docs" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
Rows = list[tuple[str, ...]]


# --- the terminal --------------------------------------------------------------------------------


def table(result: Result) -> str:
    """Every case with its providers, group by group, and the circumstances at the end."""
    parts, group = [], None
    for case, answers in result.by_case().items():
        if case.group != group:
            group = case.group
            parts.append(f"== {group}\n")
        timed = [row for row in answers.values() if row.seconds is not None]
        columns = _columns(answers, result.ceilings)
        headings = [h for h, cell in columns.items() if any(cell(row) for row in timed)]
        lines = [(str(case), *headings)]
        lines += [(f"  {r.provider}", *(columns[h](r) or "" for h in headings)) for r in timed]
        notes = [
            f"  {row.provider}: {row.status}: {row.note}"
            for row in answers.values()
            if row.seconds is None
        ]
        parts.append("\n".join([*aligned(lines), *notes]) + "\n")
    limits = [f"{name} {digits(value / 1e9)}e9" for name, value in result.ceilings.items()]
    parts.append(f"limits of this machine: {', '.join(limits)}\n{result.conditions}")
    return "\n".join(parts)


def _columns(answers, ceilings) -> dict[str, Callable[[Row], str | None]]:
    """Heading to the cell of a timed row; None where there is nothing to say."""
    mine, base = our_row(answers), fastest_plain(answers)

    def rate(row: Row, of: str, unit: float) -> str | None:
        work = getattr(row, of)
        return digits(work / row.seconds / unit) if work and row.seconds else None

    def of_floor(row: Row) -> str | None:
        percent = percent_of_floor(row, ceilings)
        return f"{percent:.0f} %" if percent else None

    def over(row: Row, other: Row | None) -> str | None:
        times = ratio(row, other)
        return None if times is None else f"{times:.2f}"

    found: dict[str, Callable[[Row], str | None]] = {
        "median": lambda row: duration(row.seconds or 0.0),
        "quartiles": lambda row: between(row.lower or 0.0, row.upper or 0.0, row.seconds or 0.0),
        "called": lambda row: duration(row.called) if row.called else None,
        "TFLOP/s": lambda row: rate(row, "flops", 1e12),
        "GB/s": lambda row: rate(row, "bytes", 1e9),
        "% floor": of_floor,
    }
    for other in (mine, base):
        if other is not None:
            found[f"/ {other.provider}"] = lambda row, other=other: over(row, other)
    return found | {
        "error": lambda row: None if row.error is None else f"{row.error:.0e}",
        "peak": lambda row: None if row.peak_bytes is None else amount(row.peak_bytes),
        "saved": lambda row: None if row.saved_bytes is None else amount(row.saved_bytes),
    }


def targets_table(result: Result) -> str:
    """All targets: bound, worst value, verdict, and where."""
    lines, where = [("Targets", "bound", "measured", "")], [""]
    for target in TARGETS:
        found = judge(target, result)
        value = "" if found.value is None else f"{found.value:.3f}"
        bound = f"{target.sense} {target.bound:.2f}"
        lines.append((target.name, bound, value, found.verdict))
        where.append(found.where)
    return "\n".join(f"{line}  {at}" for line, at in zip(aligned(lines), where, strict=True))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def misses(result: Result) -> list[str]:
    """What makes a run red: targets not met, and answers of ours that are wrong or failed."""
    found = [judge(target, result) for target in TARGETS]
    missed = [f"not met: {one.target.name}" for one in found if one.verdict == "not met"]
    broken = [
        f"{row.status}: {row.provider}, {row.case.group} {row.case}: {row.note}"
        for row in result.rows
        if row.provider in OURS and row.status in ("wrong", "failed")
    ]
    return broken + missed


# --- the docs ------------------------------------------------------------------------------------

NOT_MEASURED = "Not measured yet."
NOTHING = "–"
MARKED = re.compile(r"<!-- measured:(?P<name>\S+) -->.*?<!-- /measured -->", re.DOTALL)
ATTENTION = {
    "attention-forward": "Forward with tangent",
    "attention-backward": "Backward of the tangent",
    "attention-second-order": "Backward of both",
}


def attention(result: Result) -> str:
    """A table per direction and dtype, a line per shape."""
    parts = []
    cases = {c: a for c, a in result.by_case().items() if c.group in ATTENTION}
    for group, dtype in dict.fromkeys((case.group, case.dtype) for case in cases):
        chosen = {c: a for c, a in cases.items() if (c.group, c.dtype) == (group, dtype)}
        names = dict.fromkeys(
            row.provider
            for answers in chosen.values()
            for row in answers.values()
            if row.seconds is not None and not plain(row)
        )
        rows: Rows = []
        for case, answers in chosen.items():
            base = fastest_plain(answers)
            shape = "x".join(map(str, case.shape)) + (" causal" if case.causal else "")
            last = NOTHING if base is None else f"{_timed(base)} ({base.provider})"
            rows.append((shape, *(_timed(answers.get(name), base) for name in names), last))
        headings = ("B x H x N x D", *names, "PyTorch's fastest, no tangent")
        parts.append(f"{ATTENTION[group]}, {dtype}:\n\n{_markdown(headings, rows)}")
    return "\n\n".join(parts) or NOT_MEASURED


def end_to_end(result: Result) -> str:
    """Whole models: a line per provider, and its ratios to fine-tuning."""
    models: dict[tuple, dict[str, dict[str, Row]]] = {}
    for case, answers in result.by_case().items():
        if case.group in ("model-forward", "train-step"):
            models.setdefault((case.op, case.shape[0], case.dtype), {})[case.group] = {**answers}
    rows: Rows = []
    for (op, batch, dtype), groups in models.items():
        forward, step = (groups.get(group, {}) for group in ("model-forward", "train-step"))
        for name in dict.fromkeys((*forward, *step)):
            known = step.get(name)
            memory = (known.saved_bytes, known.peak_bytes) if known else (None, None)
            cells = (
                _timed(forward.get(name), forward.get("finetune")),
                _timed(known, step.get("finetune")),
                *(NOTHING if count is None else amount(count) for count in memory),
            )
            if any(cell != NOTHING for cell in cells):
                rows.append((f"{op}, batch {batch}, {dtype}", name, *cells))
    if not rows:
        return NOT_MEASURED
    return _markdown(("model", "", "forward", "step", "saved for backward", "peak of a step"), rows)


FIGURES = {  # by the name in a page's marker: what it states, of which kind of device
    "cpu-attention": (attention, "cpu"),
    "gpu-attention": (attention, "gpu"),
    "cpu-models": (end_to_end, "cpu"),
    "gpu-models": (end_to_end, "gpu"),
}


def rewritten(text: str, results: Sequence[Result]) -> str:
    """The page with fresh figures between `<!-- measured:NAME -->` and `<!-- /measured -->`."""

    def fresh(marker: re.Match[str]) -> str:
        write, kind = FIGURES[marker["name"]]
        parts = [f"{write(r)}\n\nMedians. {r.conditions}." for r in results if r.kind == kind]
        body = "\n\n".join(parts) or NOT_MEASURED
        return f"<!-- measured:{marker['name']} -->\n{body}\n<!-- /measured -->"

    return MARKED.sub(fresh, text)


def _timed(row: Row | None, base: Row | None = None) -> str:
    """Its median, and the ratio to the base's."""
    if row is None or row.seconds is None:
        return NOTHING
    times = ratio(row, base)
    return duration(row.seconds) + ("" if times is None else f" ({times:.2f}x)")


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the command ---------------------------------------------------------------------------------


def write_docs() -> None:
    """Figures and pictures of docs/benchmarks.md, from the newest stored result of each device."""
    from benchmarks.plots import draw_all

    results = list(newest().values())
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for result in results:
        draw_all(result, DOCS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSON, or a folder")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures into this folder")
    parser.add_argument("--docs", action="store_true", help="write docs from the stored results")
    options = parser.parse_args(arguments)
    if bool(options.files) == options.docs:
        parser.error("name FILEs, or --docs")
    try:
        if options.docs:
            write_docs()
            return 0
        result = read(options.files)
        print(f"{table(result)}\n\n{targets_table(result)}")
        if options.plots:
            from benchmarks.plots import draw_all  # matplotlib: a GPU machine may lack it

            print(*draw_all(result, folder_for(options.plots)), sep="\n")
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    for line in (red := misses(result)):
        print(line, file=sys.stderr)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
