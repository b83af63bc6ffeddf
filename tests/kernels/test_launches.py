"""Rehearsals of a GPU without one (tools/rehearsal), each in a process of its own.

Triton has one driver in a process, and decides at import whether to interpret kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tools import rehearsal
from tools.machine import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        rehearsal.compiler() is None, reason="no launch is rehearsed without a C compiler: set CC"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="rehearsed only where no GPU is"),
]


LAUNCHES = "tests/kernels/launches.py"


def rehearse(*arguments: str) -> int:
    """Run pytest on the rehearsal; the number of tests that passed, none having failed."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    options = ["-p", "tools.rehearsal.plugin", "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    return int(passed[1])


def test_every_op_launches_and_every_test_that_needs_a_gpu_runs() -> None:
    files = "python_files=test_*.py launches.py"
    assert rehearse("-m", "gpu", "-o", files, "tests") > 250


def test_compiled_kernels_launch_at_home_shapes() -> None:
    assert rehearse("--rehearse=compile", "-m", "gpu", "-k", "home", LAUNCHES) == 3


@pytest.mark.long
def test_every_test_of_the_kernels_runs() -> None:
    assert rehearse("-m", "(gpu or triton) and not long", "tests") > 1000


@pytest.mark.long
def test_compiled_kernels_launch() -> None:
    """Of every op; all combinations of tangents would be hundreds more."""
    some = "not any_tangents and not more_tangents"
    assert rehearse("--rehearse=compile", "-m", "gpu", "-k", some, LAUNCHES) > 60
