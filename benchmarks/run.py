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
from benchmarks.stored import RESULTS, folder
from tools.machine import ROOT, commit

NO_TESTS = 5  # pytest's exit status where nothing was selected


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=folder, help="default: benchmarks/results/DATE-COMMIT-DEVICE")
    parser.add_argument("--resume", action="store_true", help="skip what is measured already")
    parser.add_argument("pytest", nargs="*", help="after --: options of pytest")
    options = parser.parse_args(arguments)
    out, parts = options.out or folder(default_folder()), {"suite": ROOT / "benchmarks"}
    if options.resume:
        benches = sorted(parts["suite"].glob("bench_*.py"))
        parts = {one.stem.removeprefix("bench_"): one for one in benches}
    status, files = 0, []
    for name, tests in parts.items():
        file = out / f"{name}.json"
        if options.resume and _commit_of(file) == commit():
            print(f"{tests.name}: measured already, in {file}")
        else:
            status = max(status, _measure(tests, file, options.pytest))
        files += [str(file)] if file.exists() else []
    if not files:
        print("nothing was measured", file=sys.stderr)
        return status or 1
    return max(status, report.main(files))


def default_folder() -> str:
    """benchmarks/results/DATE-COMMIT-DEVICE."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if cuda else "cpu"
    return str(RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{commit()}-{device}")


def _commit_of(file: Path) -> str | None:
    if not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8"))["tangent_ops"]["environment"]["commit"]


def pytest_command(tests: str, result: str, options: Sequence[str]) -> list[str]:
    """Runs benchmarks and stores their result."""
    command = [sys.executable, "-m", "pytest", tests, "--benchmark-only", "-q", "-rf"]
    # pytest-benchmark's own table is 250 columns wide; the report says more in less.
    command += ["--turns=3", "--benchmark-quiet", f"--benchmark-json={result}"]
    return [*command, "-W", "ignore:Not saving anything", *options]  # a file without selected tests


def _measure(tests: Path, file: Path, options: Sequence[str]) -> int:
    """pytest's exit status; the file is there only if pytest came to its end."""
    partial = file.with_suffix(".partial")
    file.unlink(missing_ok=True)
    command = pytest_command(str(tests), str(partial), options)
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
