"""The suite from end to end: measured, kept as JSON, and held against the targets.

python -m benchmarks.run --out DIR               # what `make bench` does
python -m benchmarks.run --out DIR --resume      # group by group; run again, it goes on
python -m benchmarks.run --out DIR --compiled    # whole models alone, eager and compiled
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.record import ROOT, commit, write_json
from benchmarks.stored import COMPILED, SUITE, BadFile, folder_for, read_result
from benchmarks.suite.case import GROUPS
from benchmarks.suite.derivatives import COMPILE_ON_CPU
from benchmarks.suite.models import MODELS
from benchmarks.suite.row import Result

WITH_COMPILED_FORM = (
    "(model-forward or train-step) and (taft or finetune) and not (cached or finetune-1)"
)
NO_TESTS = 5  # pytest's exit status where nothing was selected


def main() -> int:
    options = _parse()
    out = (options.out or default_folder()).resolve()
    try:
        folder_for(out)
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    if options.compiled:
        whole, status = out / COMPILED, _compiled(out, options)
    elif options.resume:
        whole, status = out / SUITE, _groups(out, options)
    else:
        whole, status = out / SUITE, _pytest(out / SUITE, options)
    if not whole.exists():
        print("nothing was measured", file=sys.stderr)
        return status or 1
    if not options.compiled:
        _print_targets(whole)
    print(f"written: {whole}")
    return status


def _print_targets(whole: Path) -> None:
    if importlib.util.find_spec("rich") is not None:  # a GPU machine may lack it
        from benchmarks.console import wide_console
        from benchmarks.targets import print_targets

        print_targets(wide_console(), read_result(whole))


def default_folder() -> Path:
    """benchmarks/results/DATE-COMMIT-DEVICE."""
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name().replace(" ", "-").lower()
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return ROOT / "benchmarks" / "results" / f"{day}-{commit()}-{device}"


def _part(path: Path, options: argparse.Namespace, pattern: str) -> int:
    """The tests of a pattern in a process of their own; nothing if this commit's file is there."""
    if path.exists() and read_result(path).environment.get("commit") == commit():
        print(f"{path.stem}: measured already, in {path}")
        return 0
    partial = path.with_suffix(".partial")
    status = _pytest(partial, options, "-k", pattern)
    if partial.exists():
        partial.replace(path)
    return status


def _groups(out: Path, options: argparse.Namespace) -> int:
    parts = {out / f"{group}.json": group for group in GROUPS}
    status = max(_part(path, options, group) for path, group in parts.items())
    _merge(parts, out / SUITE)
    return status


def _compiled(out: Path, options: argparse.Namespace) -> int:
    """Whole models of every size by the providers that have a compiled form, and by these."""
    os.environ[COMPILE_ON_CPU] = "1"
    options.extent = "full"
    # The larger models need the memory that the others' process would not give back.
    parts = {out / f"compiled-{name}.json": f"{name} and {WITH_COMPILED_FORM}" for name in MODELS}
    status = max(_part(path, options, pattern) for path, pattern in parts.items())
    _merge(parts, out / COMPILED)
    return status


def _pytest(json_file: Path, options: argparse.Namespace, *more: str) -> int:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_suite.py", "-q", "-rf"]
    command += ["--benchmark-quiet"]  # its tables say less, in 250 columns; ours come instead
    command += [f"--benchmark-json={json_file}", f"--extent={options.extent}"]
    command += [f"--seconds={options.seconds}", *more]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status < 0:
        print(f"killed by signal {-status}; by 9 often for want of memory", file=sys.stderr)
        return 128 - status
    return 0 if status == NO_TESTS else status


def _merge(parts: Iterable[Path], whole: Path) -> None:
    """The files as one: environment and ceilings are the first's, rows are everyone's."""
    results = [read_result(path) for path in parts if path.exists()]
    if results:
        rows = [row for result in results for row in result.rows]
        together = Result(results[0].environment, results[0].ceilings, rows)
        write_json(whole, {"tangent_ops": together.to_json()})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder (default: benchmarks/results/DATE-COMMIT-DEVICE)"
    )
    parser.add_argument(
        "--extent", choices=("default", "full"), default="default", help="which cases"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for the timed rounds of a case (default: 1)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="a process per group; skip those already measured"
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="only whole models of every size, eager and compiled",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
