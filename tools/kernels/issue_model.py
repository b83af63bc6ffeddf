"""Print what kernels take on sm_90, and what an iteration of their main loop costs; no GPU needed.

    python -m tools.kernels.issue_model --directions "forward x1" "first query" --dims 64 128
    python -m tools.kernels.issue_model --directions "forward x1" --config 64 64 4 2

`loop_costs.py` says how costs are counted, `report.py` what the columns are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from tangent_kernels._launch import Config
from tangent_kernels.attention.configs import DIRECTIONS, table
from triton.errors import TritonError

from tools.kernels.report import kinds_table, record, table_of, write
from tools.kernels.resources import resources
from tools.kernels.samples import Case, launch_of


def main() -> None:
    options = _parse()
    config = Config(*options.config) if options.config else None
    records = []
    for dim in options.dims:
        for direction in options.directions:
            case = Case(direction, 90, torch.bfloat16, dim, options.variant)
            if config is None and case.key not in table():
                continue
            try:
                found = resources(launch_of(case, config), case.arch)
            except TritonError as error:
                print(f"{case.name}: {type(error).__name__}", file=sys.stderr)
                continue
            records.append(record(case, found))
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(table_of(records))
    console.print(kinds_table(records))
    if options.out:
        write(options.out, records)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    add("--dims", type=int, nargs="+", default=(64, 128), help="head dimensions")
    add("--variant", default="plain", help="of samples.variants_of")
    add("--config", type=int, nargs=4, metavar=("ROWS", "COLS", "WARPS", "STAGES"), help="tiles")
    add("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
