"""Replayed launches are those that Triton's binder would choose; see plans.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.plans import CHECKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """Each check's traceback, empty if it passed; in a process that pretends to have a GPU."""
    pytest.importorskip("triton")
    from tools.rehearsal import compiler

    if compiler() is None:
        pytest.skip("needs a C compiler")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", "tests.tools.plans"],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_plans(name, answers) -> None:
    if answers[name]:
        pytest.fail(answers[name], pytrace=False)
