"""Runs this folder under Triton's interpreter, in a process of its own.

Triton decides when a kernel is defined whether to interpret it, so the same process could not
also compile kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tangent_ops.ops.backend import interpreting

HERE = Path(__file__).parent
FILES = [  # the longest first
    "test_attention_kernels.py",
    "test_attention_autograd.py",
    "test_attention_nesting_matrix.py",
    "test_attention_numerics.py",
    "test_dual_op_kernels.py",
    "test_models.py",
    "test_rivals.py",
    "test_attention_arguments.py",
]


def interpreted(file: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    return subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The files that are asked for, one at a time to each core that this process may count on."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {call.params.get("file") for call in calls if call is not None}
    neighbours = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // neighbours))
    try:
        yield {file: pool.submit(interpreted, file) for file in FILES if file in asked}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(interpreting(), reason="runs inside it already")
@pytest.mark.parametrize("file", FILES)
def test_kernels_on_the_cpu(file: str, runs) -> None:
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 2
    print(done.stdout.splitlines()[-1])
