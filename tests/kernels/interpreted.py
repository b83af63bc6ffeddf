"""Runs test files under Triton's interpreter, in a process of their own.

Triton decides when a kernel is defined whether to interpret it, so the same process could not also
compile kernels. Each test_interpreted_*.py is one such process, and as long as the others.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tangent_ops.ops.backend import interpreting

ROOT = Path(__file__).parents[2]


def interpret(*files: str) -> None:
    """Assert that the tests in ``files``, relative to tests/, pass when interpreted."""
    if interpreting():
        pytest.skip("runs inside it already")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    paths = [str(ROOT / "tests" / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 2 * len(files)
    print(done.stdout.splitlines()[-1])
