"""Which backends a test runs on in this process, and on which device."""

from __future__ import annotations

from typing import Any

import pytest

from tangent_ops.ops.backend import interpreting


def backends(*names: str) -> list[Any]:
    """Those of ``names`` that run here, for ``pytest.mark.parametrize``.

    "triton" runs alone under TRITON_INTERPRET=1, where tests/kernels/ starts this folder once more;
    elsewhere it is marked ``gpu``.
    """
    if interpreting():
        return [name for name in names if name == "triton"]
    return [pytest.param(n, marks=pytest.mark.gpu) if n == "triton" else n for n in names]


def device_of(backend: str | None) -> str:
    return "cuda" if backend == "triton" and not interpreting() else "cpu"
