"""Linearizes a small member of every architecture family and compares it with float64.

    python -m tools.coverage                     # all; 25 minutes on 2 cores
    python -m tools.coverage --only 'swin|eva'   # some: a regular expression
    python -m tools.coverage --resume            # those without a row
    python -m tools.coverage --write             # docs/coverage.md again, from stored rows

Hugging Face's models take part where transformers is installed (`pip install transformers`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.processes import stop_by_exception
from benchmarks.stored import BadFile, folder_for
from tools.coverage.members import members
from tools.coverage.page import PAGE, STORED, page_of
from tools.coverage.sweep import read_rows, sweep


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=STORED.parent, help="folder of the rows")
    parser.add_argument("--only", default="", metavar="PATTERN", help="source, family or model")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    stop_by_exception()
    try:
        path = folder_for(options.out) / STORED.name
        rows = read_rows(path)
        if not options.write:
            chosen = members(options.only)
            rows = sweep((m for m in chosen if not (options.resume and m.key in rows)), path)
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    if path.resolve() == STORED.resolve():
        PAGE.write_text(page_of(rows.values()), encoding="utf-8")
        print(f"{PAGE} written")
    return 1 if any(row.verdict == "wrong" for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
