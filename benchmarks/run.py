"""The suite from end to end: measured, kept as JSON, and held against the targets.

python -m benchmarks.run --out DIR               # what `make bench` does
python -m benchmarks.run --out DIR --resume      # group by group; run again, it goes on
python -m benchmarks.run --out DIR --compiled    # whole models alone, eager and compiled
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.record import ROOT, commit, write_json
from benchmarks.stored import COMPILED, SUITE, BadFile, folder_for
from benchmarks.suite.case import GROUPS
from benchmarks.suite.derivatives import COMPILE_ON_CPU
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
        return _compiled(out, options)
    if not options.resume:
        status = _pytest(out / SUITE, options)
    else:
        status = max(_group(group, out, options) for group in GROUPS)
        _merge(out)
    if not (out / SUITE).exists():
        print("nothing was measured", file=sys.stderr)
        return status or 1
    content = json.loads((out / SUITE).read_text(encoding="utf-8"))
    if importlib.util.find_spec("rich") is not None:  # a GPU machine may lack it
        from benchmarks.console import wide_console
        from benchmarks.targets import print_targets

        print_targets(wide_console(), Result.from_json(content))
    print(f"written: {out / SUITE}")
    return status


def default_folder() -> Path:
    """benchmarks/results/DATE-COMMIT-DEVICE."""
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name().replace(" ", "-").lower()
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return ROOT / "benchmarks" / "results" / f"{day}-{commit()}-{device}"


def _group(group: str, out: Path, options: argparse.Namespace) -> int:
    """One group in a process of its own; nothing if an earlier run has its file."""
    path = out / f"{group}.json"
    if path.exists():
        print(f"{group}: measured already, in {path}")
        return 0
    partial = path.with_suffix(".partial")
    status = _pytest(partial, options, "-k", group)
    if partial.exists():
        partial.replace(path)
    return status


def _compiled(out: Path, options: argparse.Namespace) -> int:
    """Whole models of every size by the providers that have a compiled form, and by these."""
    os.environ[COMPILE_ON_CPU] = "1"
    options.extent = "full"
    status = _pytest(out / COMPILED, options, "-k", WITH_COMPILED_FORM)
    print(f"written: {out / COMPILED}")
    return status


def _pytest(json_file: Path, options: argparse.Namespace, *more: str) -> int:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_suite.py", "-q", "-rf"]
    command += ["--benchmark-quiet"]  # its tables say less, in 250 columns; ours come instead
    command += [f"--benchmark-json={json_file}", f"--extent={options.extent}"]
    command += [f"--seconds={options.seconds}", *more]
    status = subprocess.run(command, cwd=ROOT).returncode
    return 0 if status == NO_TESTS else status


def _merge(out: Path) -> None:
    """All groups' files as one: environment and ceilings are the first's, rows are everyone's."""
    files = [path for group in GROUPS if (path := out / f"{group}.json").exists()]
    results = [Result.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    if results:
        rows = [row for result in results for row in result.rows]
        whole = Result(results[0].environment, results[0].ceilings, rows)
        write_json(out / SUITE, {"tangent_ops": whole.to_json()})


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
        help="only whole models of every size, eager and compiled (20 minutes on 2 cores)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
