"""The GPU check from end to end on a machine without a GPU: every process of it is a rehearsal.

    PYTHONPATH=.:kernels python -m tools.rehearsal.checklist smoke --out DIR    # as tools.gpu_check

Models and shapes are small, kernels are told apart but not compiled, and numbers are muted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.machine import ROOT

FIRST = Path(__file__).with_name("everywhere")
SANITIZER = '#!/bin/sh\nshift 2\nexec "$@"\n'  # runs what it is to check
# Of the tests those of one file: tests/kernels/test_launches.py rehearses all.
PYTEST = "-p tools.rehearsal.plugin -p tools.rehearsal.small -k test_timing"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory() as folder:
        sanitizer = Path(folder, "compute-sanitizer")
        sanitizer.write_text(SANITIZER, encoding="utf-8")
        sanitizer.chmod(0o755)
        path = [FIRST, ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, path))),
            "PYTEST_ADDOPTS": PYTEST,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "tools.gpu_check", *arguments]
        return subprocess.run(command, env=os.environ | environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
