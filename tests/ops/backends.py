"""Which backends a test runs on in this process, on which device, and with how many examples."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

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


def examples(count: int) -> settings:
    """Hypothesis' settings for kernels: few examples, not shrunk, since interpreting is slow."""
    return settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
