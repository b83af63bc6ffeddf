"""Run the tests that need a GPU and, where it is installed, compute-sanitizer; needs a CUDA device.

python3 -m tools.kernels.gpu_check    # from the repository's root, with PYTHONPATH=.:kernels
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import torch

from tools.machine import ROOT


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "gpu-check needs a CUDA device, and torch finds none here. "
            "On a machine without one, `make test` runs the kernels interpreted.",
            file=sys.stderr,
        )
        return 1
    python = sys.executable
    steps = {"tests": [python, "-m", "pytest", "-m", "gpu or triton", "tests"]}
    for tool in ("memcheck", "racecheck") if shutil.which("compute-sanitizer") else ():
        sanitizer = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=1"]
        steps[tool] = [*sanitizer, python, "-m", "tools.kernels.sanitize_kernels"]
    # All steps run, also after one has failed.
    codes = {name: subprocess.run(step, cwd=ROOT).returncode for name, step in steps.items()}
    print(f"\n{torch.cuda.get_device_name()}")
    for name, code in codes.items():
        print(f"  {name:<10} {'ok' if code == 0 else f'FAILED (exit status {code})'}")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
