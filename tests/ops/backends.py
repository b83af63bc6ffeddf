"""The backends that a test runs on, and their devices."""

from __future__ import annotations

from typing import Any

import pytest

from tangent_ops.ops.backend import interpreting


def backends(*names: str) -> list[Any]:
    """``names`` for ``pytest.mark.parametrize``; "triton" is marked ``triton``."""
    return [pytest.param(n, marks=pytest.mark.triton) if n == "triton" else n for n in names]


def device_of(backend: str | None) -> str:
    return "cuda" if backend == "triton" and not interpreting() else "cpu"
