"""pytest plugin: tests for a GPU run on the rehearsal, `pytest -p tools.rehearsal.plugin ...`.

Tensors stay on the CPU and kernels do not run, so all numbers are garbage. Therefore comparisons of
numbers are muted: an AssertionError that a test itself raises is listed in the summary, and passes.
Every other exception, and an AssertionError of the library, fails the test.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tools import rehearsal
from tools.machine import ROOT

# What the GPU checklist does not ask for: tests that need it have to be skipped, not to fail.
EXTRAS = ("opacus", "dp_accounting", "ray", "tensorboard", "onnx", "matplotlib", "sklearn", "peft")

MUTED = "muted"  # the property of a report that holds the muted error


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse",
        choices=("count", "compile"),
        default="count",
        help="tell kernels apart only, or compile them for sm_90 too",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in EXTRAS:
        sys.modules[name] = None  # type: ignore[assignment]
    rehearsal.start(compiled=config.getoption("--rehearse") == "compile")


def pytest_collection_finish() -> None:
    """Comparisons that many tests share look at shapes and dtypes only."""
    from tests.ops import oracle

    oracle.error = _no_error
    torch.testing.assert_close = _assert_alike


def _no_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.shape == exact.shape
    return 0.0


def _assert_alike(actual: Any, expected: Any, **options: Any) -> None:
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.shape == other.shape, "shapes differ"
            assert one.dtype == other.dtype or not options.get("check_dtype", True), "dtypes differ"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with rehearsal.CudaNames():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    try:
        return (yield)
    except AssertionError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        path = Path(last.filename)
        if not (path.is_relative_to(ROOT / "tests") or path.parent.name == "testing"):
            raise
        pyfuncitem.user_properties.append((MUTED, f"{path.name}:{last.lineno} {last.line}"))
        return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    muted = [
        (x.nodeid, dict(x.user_properties)[MUTED])
        for x in passed
        if MUTED in dict(x.user_properties)
    ]
    terminalreporter.section("rehearsal")
    terminalreporter.line(
        f"{rehearsal.launch_count()} launches of {len(rehearsal.loaded_kernels())} kernels; "
        f"{len(muted)} of {len(passed)} tests ended at a comparison of numbers"
    )
    for name, why in muted:
        terminalreporter.line(f"  {name}: {why}")
