"""The four parts, in order of value, and their steps, in order of value."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from benchmarks.run import pytest_command
from tools.gpu_check.step import Step

PYTHON = sys.executable
CORES = os.cpu_count() or 1
# The tuner writes into a copy of the kernels, and the suite then measures the copy.
COPY = {"PYTHONPATH": f"{{out}}/kernels:{os.environ.get('PYTHONPATH', '.:kernels')}"}
COPY_IN_PYTEST = ["-o", "pythonpath=. {out}/kernels"]  # pyproject.toml's goes before PYTHONPATH
CUDA_TOOLS = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"


def _module(name: str, module: str, seconds: float, *options: str, **more: dict[str, str]) -> Step:
    return Step(name, [PYTHON, "-m", module, *options], seconds, **more)


def _suite(name: str, file: str, seconds: float, selected: str, *options: str) -> Step:
    """A file of the benchmarks; its result is suite-NAME.json."""
    result = f"{{out}}/suite-{name.replace(' ', '-')}.json"
    options = ("-k", selected, "--extent=home", "-p", "no:cacheprovider", *options)
    return Step(name, pytest_command(f"benchmarks/{file}", result, options), seconds)


def _attention(name: str, seconds: float, selected: str, *options: str) -> Step:
    return _suite(name, "bench_attention.py", seconds, selected, *options)


def _models(name: str, seconds: float, selected: str, *options: str) -> Step:
    return _suite(name, "bench_models.py", seconds, selected, *options)


def _sanitizer(tool: str, seconds: float) -> Step:
    """Every kernel once, under one of compute-sanitizer's tools."""
    found = shutil.which("compute-sanitizer", path=CUDA_TOOLS) or "compute-sanitizer"
    command = [found, f"--tool={tool}", "--error-exitcode=1", PYTHON, "-m"]
    return Step(tool, [*command, "tools.kernels.sanitize_kernels"], seconds)


# Compiled models take a minute or more to compile: in one turn.
COMPILED = "train_step and (taft-all-compiled or finetune-compiled)"
UNCOMPILED = "(taft-all or finetune) and not compiled and not finetune-1"

PARTS: dict[str, Sequence[Step]] = {
    "smoke": [
        _module("machine", "tools.gpu_check.machine", 40, "--out={out}/machine.json"),
        _module(
            "numerics", "tools.gpu_check.numerics", 120, f"--jobs={min(8, CORES)}",
            "--out={out}/numerics.json",
        ),
        _attention("attention forward", 110, "forward and not compiled"),
        _attention("attention backward", 90, "backward and not compiled"),
        _attention("attention second order", 90, "second_order and not compiled"),
        _suite("layers", "bench_layers.py", 60, "not compiled"),
    ],
    "tune": [
        Step("copy", ["cp", "-r", "kernels", "{out}/kernels"], 10),
        _attention("before", 70, "ours or sdpa"),
        _module(
            "tune", "tools.kernels.tune_attention", 330, "--dims", "64", "128", f"--jobs={CORES}",
            environment=COPY,
        ),
        _attention("after", 70, "ours or sdpa", *COPY_IN_PYTEST),
    ],
    "models": [
        _module("host", "tools.host_time", 30, "--out={out}/host.json"),
        _models("base", 100, f"vit_base and {UNCOMPILED}"),
        _models("base compiled", 180, f"vit_base and {COMPILED}", "--turns=1"),
        _models("small", 50, f"vit_small and {UNCOMPILED}"),
        _models("small compiled", 100, f"vit_small and {COMPILED}", "--turns=1"),
        _module(
            "profile", "tangent_ops.cli", 60, "profile", "--model", "vit_base_patch16_224",
            "--batch", "64", "--dtype", "bf16", "--mode", "train", "--out", "{out}/profile",
        ),
    ],
    "tests": [
        _module(
            "tests", "pytest", 350, "tests", "-m", "gpu or triton", f"-n={min(8, CORES)}",
            "--dist=worksteal", "-q", "-p", "no:cacheprovider", "--durations=20",
        ),
        _sanitizer("memcheck", 90),
        _sanitizer("racecheck", 90),
    ],
}  # fmt: skip
