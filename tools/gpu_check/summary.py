"""What a part has found, short enough for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import aligned, digits, si, table, targets_table
from benchmarks.roofline import percent_of_floor
from benchmarks.stored import OURS, BadFile, Result, Row, ratio, read
from tools.gpu_check.step import Outcome

MOST, WIDTH = 20, 160  # lines of failures that are shown, and their characters


def text(part: str, outcomes: Sequence[Outcome], folder: Path) -> str:
    """Of the files that the steps have left in the folder; report.txt has the long table."""
    parts = [_machine(folder), _numerics(folder), _host(folder), _tests(folder)]
    if part == "tune":
        parts.append(_before_and_after(folder))
    elif result := _result(sorted(folder.glob("suite-*.json"))):
        report = f"{table(result)}\n\n{targets_table(result)}\n"
        (folder / "report.txt").write_text(report, encoding="utf-8")
        parts += [ratios(result), _failures(result), _targets(result)]
    lines = [(part, "", "seconds")]
    lines += [(f"  {one.step}", one.state, f"{one.seconds:.0f}") for one in outcomes]
    return "\n\n".join([*filter(None, parts), "\n".join(aligned(lines))])


def _json(file: Path) -> Any:
    """The content; None where the step has not come to write it."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _result(files: Sequence[Path]) -> Result | None:
    try:
        return read(files)
    except BadFile:  # nothing was measured
        return None


def _machine(folder: Path) -> str:
    found = _json(folder / "machine.json")
    if found is None:
        return ""
    about, limits = found["environment"], found["ceilings"]
    rates = [f"{name} {digits(value / 1e9)}e9" for name, value in limits.items()]
    names = ("gpu", "clocks", "torch", "triton", "commit")
    return "\n".join([*(f"{name}: {about[name]}" for name in names), ", ".join(rates)])


def _numerics(folder: Path) -> str:
    rows = _json(folder / "numerics.json")
    if rows is None:
        return ""
    wrong = [row for row in rows if row["status"] != "ok"]
    lines = [f"{row['status']}: {row['group']} {row['case']}: {row['note']}" for row in wrong]
    right = [row for row in rows if row["error"] is not None]
    if right:
        worst = max(right, key=lambda row: row["error"] / row["allowed"])
        error = f"{worst['error']:.1e} of {worst['allowed']:.1e} allowed"
        lines.append(f"worst of the right ones: {worst['group']} {worst['case']}: {error}")
    return "\n".join([f"numerics: {len(right)} of {len(rows)} right", *lines])


def _host(folder: Path) -> str:
    found = _json(folder / "host.json")
    if found is None:
        return ""
    lines = [("host's time per call", "µs", "/ torch.add")]
    for name, seconds in found.items():
        lines.append((name, f"{1e6 * seconds:.1f}", digits(seconds / found["torch.add"])))
    return "\n".join(aligned(lines))


def _tests(folder: Path) -> str:
    """What failed, and pytest's last line."""
    log = folder / "tests.log"
    if not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n".join(filter(None, [_some(bad), *lines[-1:]]))


def _some(lines: Sequence[str]) -> str:
    """As many as a terminal shows, and whose ends it shows."""
    more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
    return "\n".join([*(line[:WIDTH] for line in lines[:MOST]), *more])


def ratios(result: Result) -> str:
    """A line per case: our time, and the others' as multiples of it; "-" where there is none."""
    by_group: dict[str, dict] = {}
    for case, answers in result.by_case().items():
        by_group.setdefault(case.group, {})[case] = answers
    tables = []
    for group, cases in by_group.items():
        timed = [row for answers in cases.values() for row in answers.values() if row.seconds]
        names = [*dict.fromkeys(row.provider for row in timed)] or [OURS[0]]
        ours = next((name for name in names if name in OURS), names[0])
        others = [name for name in names if name != ours]
        lines = [(group, ours, "called", "% floor", *others)]
        for case, answers in cases.items():
            own = answers.get(ours)
            times = [_times(ratio(answers.get(name), own)) for name in others]
            lines.append((f"  {case}", *_own(own, result), *times))
        tables.append("\n".join(aligned(lines)))
    return "\n\n".join(tables)


def _failures(result: Result) -> str:
    """Providers that should have been timed, and why they were not."""
    rows = [row for row in result.rows if row.status in ("wrong", "failed")]
    lines = [
        f"{row.provider}, {row.case.group} {row.case}: {row.status}: {row.note}" for row in rows
    ]
    return _some(lines)


def _targets(result: Result) -> str:
    """Those that speak of cases of this part."""
    others = ("a target for a CPU", "no such case")
    return "\n".join(
        line for line in targets_table(result).splitlines() if not line.endswith(others)
    )


def _own(row: Row | None, result: Result) -> tuple[str, str, str]:
    """Time, time with Python, and percents of the floor."""
    if row is None or row.seconds is None:
        return (row.status if row else "-", "-", "-")
    percent = percent_of_floor(row, result.ceilings)
    called = si(row.called, "s") if row.called is not None else "-"
    return si(row.seconds, "s"), called, f"{percent:.0f}" if percent else "-"


def _times(value: float | None) -> str:
    return "-" if value is None else digits(value)


def _before_and_after(folder: Path) -> str:
    """Our times with the tiles as they were and as they are chosen."""
    before, after = (_result([folder / f"suite-{name}.json"]) for name in ("before", "after"))
    if before is None or after is None:
        return "tiles: not measured both before and after"
    lines = [("ours", "before", "after", "after / before")]
    for case, answers in after.by_case().items():
        new, old = answers.get("ours"), before.by_case().get(case, {}).get("ours")
        if new and old and new.seconds and old.seconds:
            times = (si(old.seconds, "s"), si(new.seconds, "s"))
            lines.append((f"{case.group} {case}", *times, _times(ratio(new, old))))
    return "\n".join([*aligned(lines), "", ratios(after)])
