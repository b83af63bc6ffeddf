"""pytest plugin: tests for a GPU run on the rehearsal, `pytest -p tools.rehearsal.plugin ...`.

Tensors stay on the CPU and kernels do not run: results are garbage. So comparisons of numbers are
muted: shared ones look at shapes and dtypes only, and an AssertionError in a line that compares
numbers (NUMBERS) passes, as does a loss that is not finite. The summary lists these tests. Every
other exception fails the test.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tangent_ops.errors import NonFiniteLossError
from tools import rehearsal

# What the GPU checklist does not ask for: tests that need it have to be skipped, not to fail.
EXTRAS = ("opacus", "dp_accounting", "ray", "tensorboard", "onnx", "matplotlib", "sklearn", "peft")

# What the line or the message of a muted assertion is about.
NUMBERS = re.compile(
    r"^wrong \S+$|equal\(|isfinite|\babs\(|\.max\(\)|\.norm\(\)|error\(|approx|peak_bytes|\.is_cuda"
)
# Tests that need the memory or the speed of a GPU.
TOO_LARGE = ("test_offsets_beyond_32_bits", "test_ceilings_of_a_gpu", "test_a_long_sequence")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.startswith(TOO_LARGE):
            item.add_marker(pytest.mark.skip(reason="needs a GPU's memory or speed"))


def pytest_collection_finish() -> None:
    """Comparisons that many tests share, and the library's own, compare no numbers."""
    from tangent_ops.model import check_derivatives
    from tests.ops import oracle

    for module, name, stand_in in (
        (oracle, "error", _no_error),
        (torch.testing, "assert_close", _assert_alike),
        (check_derivatives, "_refuse", lambda side, lost: None),
    ):
        assert hasattr(module, name)
        setattr(module, name, stand_in)


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
    except (AssertionError, NonFiniteLossError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = (str(error).splitlines() or [""])[0]
        about = next(filter(NUMBERS.search, (said, frame.line or "")), None)
        if isinstance(error, NonFiniteLossError):
            about = said
        if about is None:
            raise
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        pyfuncitem.user_properties.append((MUTED, f"{where} {about}"))
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
