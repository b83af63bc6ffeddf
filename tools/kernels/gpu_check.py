"""Everything that needs a CUDA device, in one command: tests, compute-sanitizer, the suite.

Works installed, and uninstalled from the repository's root with `PYTHONPATH=.:kernels`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.record import ROOT, environment, write_json
from benchmarks.run import default_folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder (default: benchmarks/results/DATE-COMMIT-DEVICE)"
    )
    out = parser.parse_args().out or default_folder()
    if not torch.cuda.is_available():
        return _refuse()
    out = out.resolve()
    write_json(out / "environment.json", environment("cuda"))
    pytest = [sys.executable, "-m", "pytest"]
    steps = {
        "tests": [*pytest, "-m", "gpu", "tests", f"--junitxml={out / 'gpu-tests.xml'}"],
    }
    for tool in ("memcheck", "racecheck") if shutil.which("compute-sanitizer") else ():
        steps[tool] = [
            "compute-sanitizer",
            f"--tool={tool}",
            "--error-exitcode=1",
            f"--log-file={out / tool}.txt",
            sys.executable,
            "-m",
            "tools.kernels.sanitize_kernels",
        ]
    steps["suite"] = [sys.executable, "-m", "benchmarks.run", "--resume", f"--out={out}"]
    # A red test does not keep the rest from being measured; the last lines say what was red.
    codes = {name: subprocess.run(step, cwd=ROOT).returncode for name, step in steps.items()}
    print(f"\n{torch.cuda.get_device_name()}, results in {out}")
    for name, code in codes.items():
        print(f"  {name:<10} {'ok' if code == 0 else f'FAILED (exit status {code})'}")
    return int(any(codes.values()))


def _refuse() -> int:
    print(
        "gpu-check measures on a CUDA device, and torch finds none here. "
        "On a machine without one, `make test` runs what can run (the kernels interpreted).",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
