"""The kernels' tests run on a GPU, or interpreted on the CPU in a process of their own.

Under TRITON_INTERPRET=1 (see test_interpreted.py) they run here and now; otherwise they are
marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tangent_ops.ops.backend import interpreting

HERE = Path(__file__).parent
ANYWHERE = ("test_interpreted.py", "test_resources.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path.name not in ANYWHERE and not interpreting():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cpu" if interpreting() else "cuda"


@contextmanager
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills memory that empty() returns with NaN
    try:
        assert torch.empty(2, 3).new_empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned():
    """A context in which every freshly allocated floating-point tensor is full of NaN."""
    return _poison
