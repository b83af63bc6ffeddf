"""Linearize a small member of every architecture family and compare it with float64.

tools/README.md lists the options. Exit status 1: a model is wrong without an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.coverage.measure import WRONG
from tools.coverage.members import members
from tools.coverage.page import PAGE, STORED, page_of
from tools.coverage.sweep import read_rows, sweep


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=STORED, help="file of the rows")
    parser.add_argument("--only", default="", metavar="PATTERN", help="source, family or model")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args(arguments)
    rows = read_rows(options.rows)
    if not options.write:
        chosen = members(options.only)
        rows = sweep((m for m in chosen if not (options.resume and m.key in rows)), options.rows)
    if options.rows.resolve() == STORED.resolve():
        PAGE.write_text(page_of(rows.values()), encoding="utf-8")
        print(f"{PAGE} written")
    return int(any(row.verdict == WRONG for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
