"""``--fuzz-seed``, and the counts of outcomes at the end of a run."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seed", type=int, help="run this one program (with tests/fuzz)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)
    ]
    found = Counter(
        value for report in reports for name, value in report.user_properties if name == "fuzz"
    )
    if found:
        counts = ", ".join(f"{count} {how}" for how, count in found.most_common())
        terminalreporter.write_line(f"fuzz: {found.total()} programs: {counts}")
