"""docs/coverage.md, from the stored rows."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.coverage.measure import Row
from benchmarks.record import ROOT
from benchmarks.stored import RESULTS

STORED = RESULTS / "coverage" / "coverage.jsonl"
PAGE = ROOT / "docs" / "coverage.md"


def page_of(rows: Iterable[Row]) -> str:
    return ""
