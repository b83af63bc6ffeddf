"""All benchmarks with one command: measured, stored in a folder, reported.

    python -m benchmarks.run --out DIR              # `make bench`: DIR/suite.json
    python -m benchmarks.run --out DIR --resume     # `make gpu-bench`: a JSON per bench_*.py
    python -m benchmarks.run --out DIR -- -k step   # what follows is pytest's

With ``--resume`` files that this commit has measured are skipped, so a killed run goes on. The exit
status is pytest's, or that of ``benchmarks.report`` where pytest's is 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.record import ROOT, commit
from benchmarks.stored import BadFile, folder_for

FOLDER = ROOT / "benchmarks"
NO_TESTS = 5  # pytest's exit status where nothing was selected


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-COMMIT-DEVICE")
    parser.add_argument("--resume", action="store_true", help="skip what is measured already")
    parser.add_argument("pytest", nargs="*", help="after --: options of pytest")
    options = parser.parse_args(arguments)
    try:
        out = folder_for((options.out or default_folder()).resolve())
    except BadFile as problem:
        print(problem, file=sys.stderr)
        return 2
    parts = {out / "suite.json": FOLDER}
    if options.resume:
        benches = sorted(FOLDER.glob("bench_*.py"))
        parts = {out / f"{one.stem.removeprefix('bench_')}.json": one for one in benches}
    status = 0
    for file, tests in parts.items():
        if options.resume and _commit_of(file) == commit():
            print(f"{tests.name}: measured already, in {file}")
        else:
            status = max(status, _measure(tests, file, options.pytest))
    files = [str(file) for file in parts if file.exists()]
    if not files:
        print("nothing was measured", file=sys.stderr)
        return status or 1
    return max(status, report.main(files))


def default_folder() -> Path:
    """benchmarks/results/DATE-COMMIT-DEVICE."""
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name().replace(" ", "-").lower()
    return FOLDER / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{commit()}-{device}"


def _commit_of(file: Path) -> str | None:
    if not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))["tangent_ops"]["environment"]["commit"]


def _measure(tests: Path, file: Path, options: Sequence[str]) -> int:
    """pytest's exit status; the file is there only if pytest came to its end."""
    partial = file.with_suffix(".partial")
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(tests), "--benchmark-only", "-q", "-rf"]
    # pytest-benchmark's own table is 250 columns wide; the report says more in less.
    command += ["--turns=3", "--benchmark-quiet", f"--benchmark-json={partial}"]
    command += ["-W", "ignore:Not saving anything", *options]  # a file without selected tests
    status = subprocess.run(command, cwd=ROOT).returncode
    if partial.exists() and partial.stat().st_size:
        partial.replace(file)
    partial.unlink(missing_ok=True)
    if status < 0:
        print(f"killed by signal {-status}; by 9 often for want of memory", file=sys.stderr)
        return 128 - status
    return 0 if status == NO_TESTS else status


if __name__ == "__main__":
    sys.exit(main())
