"""Runs this folder under Triton's interpreter, in a process of its own.

Triton decides when a kernel is defined whether to interpret it, so the same process could not
also compile kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tangent_ops.functional._backend import interpreting

HERE = Path(__file__).parent
FILES = [
    "test_attention_arguments.py",
    "test_attention_kernels.py",
    "test_attention_numerics.py",
    "test_attention_autograd.py",
    "test_attention_nesting_matrix.py",
    "test_dual_op_kernels.py",
    "test_models.py",
    "test_rivals.py",
]


@pytest.mark.skipif(interpreting(), reason="runs inside it already")
@pytest.mark.parametrize("file", FILES)
def test_kernels_on_the_cpu(file) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 2
    print(done.stdout.splitlines()[-1])
