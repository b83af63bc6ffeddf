"""The kernels' tests: on a GPU, or interpreted on the CPU where TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tangent_ops.ops.backend import interpreting

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # test_launches.py starts processes that launch kernels, and launches none itself.
        if item.path.parent == HERE and item.path.name != "test_launches.py":
            item.add_marker(pytest.mark.triton)


@pytest.fixture
def device() -> str:
    return "cpu" if interpreting() else "cuda"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a call of few tokens has several tiles, and edges."""
    from tangent_kernels.attention import configs  # it needs Triton

    if interpreting():
        tiles = configs.Config(16, 16, 4, 1)
        monkeypatch.setattr(configs, "_tuned", dict.fromkeys(configs.table(), tiles))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Shapes of (query, query_t) of every forward launch."""
    from tangent_kernels import attention as kernels  # it needs Triton

    calls = []
    original = kernels.attention_jvp

    def record(call, *tangents):
        calls.append([None if t is None else t.shape[0] for t in tangents[:1]] + [call.query.shape])
        return original(call, *tangents)

    monkeypatch.setattr(kernels, "attention_jvp", record)
    return calls
